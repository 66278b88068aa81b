#!/usr/bin/env -S node --max-semi-space-size=8 --heap-growing-percent=60 --no-memory-reducer --v8-pool-size=2
import cluster from 'node:cluster'
import { ignoreSignals, receiveSignals } from './signals.ts'

// Process 1 of a container loses a signal that it has no handler for, and the rest takes half a second to load.
if (cluster.isWorker) ignoreSignals()
else receiveSignals()

await import('./main.ts')
