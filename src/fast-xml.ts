// SPDX-License-Identifier: Apache-2.0
/**
 * fast-xml-parser as the one file that it has for CommonJS: its 43 modules take four times
 * as long to load, which every command would feel.
 */
import { createRequire } from 'node:module';
import type * as FastXml from 'fast-xml-parser';

const library = createRequire(import.meta.url)('fast-xml-parser') as typeof FastXml;

export const XMLBuilder: typeof FastXml.XMLBuilder = library.XMLBuilder;
export const XMLParser: typeof FastXml.XMLParser = library.XMLParser;
export const XMLValidator: typeof FastXml.XMLValidator = library.XMLValidator;
