/** Directory of a gateway's files, below the working directory, where no other one is given. */
export const DATA_DIR = './data'
