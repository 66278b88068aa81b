/** Request bodies as undici gets them: it holds on to them until the answer has ended, and a prompt is large. */

/** Bytes that are nobody else's, and lie outside Node's pool, of which a few would hold 64 KB. */
export function copyOf(bytes: Buffer): Buffer {
  const copy = Buffer.allocUnsafeSlow(bytes.length)
  bytes.copy(copy)
  return copy
}

/** Gives the memory of a {@link copyOf} back, whoever still refers to it: they see no bytes. */
export function giveBack(bytes: Buffer): void {
  const buffer = bytes.buffer as ArrayBuffer
  if (bytes.length === buffer.byteLength) buffer.transfer(0)
}
