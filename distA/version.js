import packageJson from '../package.json' with { type: 'json' };
/** The gateway's version, as in package.json. */
export const VERSION = packageJson.version;
