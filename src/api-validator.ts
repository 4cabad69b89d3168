// SPDX-License-Identifier: Apache-2.0
/** Validates requests as fastify's own compilers would, but costs nothing before the first one. */
import { Ajv, type AnySchema, type ErrorObject, type ValidateFunction } from 'ajv';
import type { FastifyServerOptions } from 'fastify';

/** What fastify takes of a validator of Ajv. */
interface Validate {
  (data: unknown): boolean;
  /** Of the last call. */
  errors: ErrorObject[] | null;
}

type SchemaController = NonNullable<FastifyServerOptions['schemaController']>;
type BuildValidator = NonNullable<
  NonNullable<SchemaController['compilersFactory']>['buildValidator']
>;

/**
 * fastify compiles all schemas before it listens, which was a quarter of the time of a backup
 * that a command begins and that is refused. Here the first request of each compiles it.
 */
function lazyValidator(): (route: { readonly schema: AnySchema }) => Validate {
  let ajv: Ajv | undefined;
  return ({ schema }) => {
    let compiled: ValidateFunction | undefined;
    const validate: Validate = (data) => {
      ajv ??= new Ajv({ useDefaults: true });
      compiled ??= ajv.compile(schema);
      const isRight = compiled(data);
      validate.errors = compiled.errors ?? null;
      return isRight;
    };
    validate.errors = null;
    return validate;
  };
}

/** What fastify is to use: answers are what they are, and have no schemas. */
export const schemaController: SchemaController = {
  compilersFactory: {
    buildValidator: lazyValidator as unknown as BuildValidator,
    buildSerializer: () => () => (data) => JSON.stringify(data),
  },
};
