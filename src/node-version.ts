/** As in `engines` of package.json. */
const OLDEST = 24

/** Returns why a version of Node is not supported; undefined if it is. */
export function nodeIssue(version: string): string | undefined {
  const [major] = version.replace(/^v/, '').split('.')
  if (Number(major) >= OLDEST) return undefined
  return `llmproxy needs Node.js ${OLDEST} or later; this is ${version} (${process.execPath})`
}
