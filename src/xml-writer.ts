// SPDX-License-Identifier: Apache-2.0
/** Writes XML: what begins with `@` is an attribute. */
import { XMLBuilder } from 'fast-xml-parser';

export function writeXml(document: object): string {
  // Made when it is needed, as many commands need no XML.
  const builder = new XMLBuilder({
    ignoreAttributes: false,
    attributeNamePrefix: '@',
    format: true,
    suppressEmptyNode: true,
    suppressBooleanAttributes: false,
  });
  return builder.build(document);
}
