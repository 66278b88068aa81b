/** The gateway's version, as in package.json. */
export declare const VERSION: string;
