import { nodeIssue } from './node-version.ts'

// The first import of every module that hosts import: it is evaluated before anything that an old Node lacks.
const issue = nodeIssue(process.version)
if (issue !== undefined) throw new Error(issue)
