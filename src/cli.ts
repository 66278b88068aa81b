#!/usr/bin/env -S node --max-semi-space-size=8 --heap-growing-percent=60 --no-memory-reducer --v8-pool-size=2
import cluster from 'node:cluster'
import { nodeIssue } from './node-version.ts'
import { ignoreSignals, receiveSignals } from './signals.ts'

const issue = nodeIssue(process.version)
if (issue !== undefined) {
  process.stderr.write(`${issue}\n`)
  process.exit(1)
}

// Process 1 of a container loses a signal that it has no handler for, and the rest takes half a second to load.
if (cluster.isWorker) ignoreSignals()
else receiveSignals()

await import('./main.ts')
