import assert from 'node:assert/strict'
import { test } from 'node:test'
import { EventReader, type StreamFraming } from '../src/wire/event-reader.ts'

/** The one reader of event streams: WHATWG's cases, and the same result for any split of the bytes. */

interface Event {
  data: string | undefined
  isError: boolean
  /** Bytes of the stream up to the end of the event. */
  end: number
}

/** Reads a stream in chunks; the end of the stream ends the last event. */
function read(chunks: readonly Buffer[], framing: StreamFraming = 'sse'): Event[] {
  const reader = new EventReader(framing)
  const events: Event[] = []
  let data = ''
  let before = 0
  const take = (length: number) => {
    for (let next = reader.next(); next !== undefined; next = reader.next()) {
      if (next === 'data') data += reader.data.toString('latin1')
      else {
        const { hasData, isError, to } = reader
        const text = Buffer.from(data, 'latin1').toString()
        events.push({ data: hasData ? text : undefined, isError, end: before + to })
        data = ''
      }
    }
    before += length
  }
  for (const chunk of chunks) {
    reader.feed(chunk)
    take(chunk.length)
  }
  reader.feedEnd()
  take(0)
  return events
}

function datas(text: string, framing?: StreamFraming): string[] {
  return read([Buffer.from(text)], framing).flatMap(({ data }) => data ?? [])
}

// https://html.spec.whatwg.org/multipage/server-sent-events.html and web-platform-tests/eventsource
const CASES: [string, string, string[]][] = [
  ['one event', 'data: a\n\n', ['a']],
  ['several data lines', 'data: a\ndata: b\ndata\n\n', ['a\nb\n']],
  ['only the first space is left out', 'data:  a\n\ndata:b\n\n', [' a', 'b']],
  ['CRLF', 'data: a\r\ndata: b\r\n\r\ndata: c\r\n\r\n', ['a\nb', 'c']],
  ['CR', 'data: a\rdata: b\r\rdata: c\r\r', ['a\nb', 'c']],
  ['mixed line ends', 'data: a\r\ndata: b\n\rdata: c\r\n\n', ['a\nb', 'c']],
  ['a byte order mark', '\ufeffdata: a\n\n', ['a']],
  ['a second byte order mark is a field', '\ufeff\ufeffdata: a\n\ndata: b\n\n', ['b']],
  ['comments', ': ping\n\n:\n\ndata: a\n: in between\n\n', ['a']],
  ['an empty value', 'data:\n\ndata\n\n', ['', '']],
  ['other fields', 'event: x\nid: 1\nretry: 5\ndata: a\ndatas: no\ndat: no\n\n', ['a']],
  ['an event without data', 'event: x\n\ndata: a\n\n', ['a']],
  ['many blank lines', '\n\n\ndata: a\n\n\n\n\ndata: b\n\n\n', ['a', 'b']],
  ['a leading space makes another field', ' data: no\n\ndata: a\n\n', ['a']],
  ['a colon in the value', 'data: a:b\n\n', ['a:b']],
  ['UTF-8', 'data: héllo 漢字 🙂\n\n', ['héllo 漢字 🙂']],
  ['a null byte', 'data: a\0b\n\n', ['a\0b']],
  ['no blank line at the end', 'data: a\n\ndata: b\n', ['a', 'b']],
  ['no line end at the end', 'data: a\n\ndata: b', ['a', 'b']],
  ['an error line of old llama.cpp', 'error: {"code":500}\n\n', ['{"error":{"code":500}}']],
  ['an error line behind data', 'data: a\nerror: 1\ndata: b\n\n', ['a\n{"error":1}\nb']],
  ['an error line without a value', 'error\n\nerror:\r\n\r\n', ['{"error":}', '{"error":}']]
]

for (const [name, text, expected] of CASES) {
  test(`events: ${name}`, () => {
    assert.deepEqual(datas(text), expected)
  })

  test(`events, split at every byte: ${name}`, () => {
    const bytes = Buffer.from(text)
    const content = (chunks: Buffer[]) =>
      read(chunks).map(({ data, isError }) => ({ data, isError }))
    const whole = content([bytes]).filter(({ data }) => data !== undefined)
    const shown = (chunks: Buffer[]) => content(chunks).filter(({ data }) => data !== undefined)
    for (let at = 0; at <= bytes.length; at++) {
      assert.deepEqual(shown([bytes.subarray(0, at), bytes.subarray(at)]), whole, `split at ${at}`)
    }
    assert.deepEqual(shown(Array.from(bytes, byte => Buffer.from([byte]))), whole, 'each byte')
  })
}

test('a chunk is searched once, wherever its line ends are', () => {
  // Bytes that a search may pass again and again: lines of one kind before an end of the other kind.
  const searched = (text: string) => {
    const chunk = Buffer.from(text)
    let bytes = 0
    chunk.indexOf = (value: unknown, from = 0) => {
      const at = Buffer.prototype.indexOf.call(chunk, value as number, from)
      bytes += (at === -1 ? chunk.length : at) - Number(from)
      return at
    }
    read([chunk])
    return bytes / chunk.length
  }
  for (const line of ['a:\n', 'a:\r', 'data: x\r\n']) {
    for (const end of ['', '\r', '\n']) {
      const share = searched(line.repeat(10_000) + end)
      assert.ok(share < 3, `${JSON.stringify(line)} ${share}`)
    }
  }
})

test('the end of an event is behind its blank line', () => {
  const ends = (text: string) => read([Buffer.from(text)]).map(({ end }) => end)
  assert.deepEqual(ends('data: a\n\ndata: b\n\n').slice(0, 2), [9, 18])
  assert.deepEqual(ends('data: a\r\n\r\ndata: b\r\n\r\n').slice(0, 2), [11, 22])
  assert.deepEqual(ends('data: a\r\rdata: b\r\r').slice(0, 2), [9, 18])
})

test('the name of an event is read', () => {
  const errors = (text: string) =>
    read([Buffer.from(text)]).flatMap(({ data, isError }) => (data === undefined ? [] : isError))
  const text =
    'event: error\ndata: a\n\ndata: b\n\nevent:error\ndata: c\n\nevent: errors\ndata: d\n\n'
  assert.deepEqual(errors(text), [true, false, true, false])
  assert.deepEqual(errors('event: error\nevent: other\ndata: a\n\n'), [false])
})

test('lines of JSON are events', () => {
  assert.deepEqual(datas('{"a":1}\n{"b":2}\n', 'ndjson'), ['{"a":1}', '{"b":2}'])
  assert.deepEqual(datas('\n{"a":1}\r\n\r\n{"b":2}', 'ndjson'), ['{"a":1}', '{"b":2}'])
  assert.deepEqual(datas('data: 1\n\n', 'ndjson'), ['data: 1'])
  const bytes = Buffer.from('{"a":1}\r\n{"b":"ü"}\n\n{"c":3}')
  for (let at = 0; at <= bytes.length; at++) {
    const events = read([bytes.subarray(0, at), bytes.subarray(at)], 'ndjson')
    const texts = events.flatMap(({ data }) => data ?? [])
    assert.deepEqual(texts, ['{"a":1}', '{"b":"ü"}', '{"c":3}'], `split at ${at}`)
  }
})

test('the reader tells whether a line and an event are complete', () => {
  const reader = new EventReader('sse')
  const state = (text: string) => {
    reader.feed(Buffer.from(text))
    while (reader.next() !== undefined);
    return [reader.isBetweenLines, reader.isBetweenEvents]
  }
  assert.deepEqual(state(''), [true, true])
  assert.deepEqual(state('da'), [false, false])
  assert.deepEqual(state('ta: {'), [false, false])
  assert.deepEqual(state('}\n'), [true, false])
  assert.deepEqual(state('\n'), [true, true])
  assert.deepEqual(state(': ping'), [false, false])
  assert.deepEqual(state('\n\n'), [true, true])
})

test('a chunk that has been read is not kept', () => {
  for (const text of ['data: {"n":1}\n\n', 'data: {"n"', 'event: er', 'data: 1\n\ndata: 2']) {
    const reader = new EventReader('sse')
    const chunk = Buffer.from(text)
    reader.feed(chunk)
    let isSeen = false
    for (let next = reader.next(); next !== undefined; next = reader.next()) {
      isSeen ||= reader.bytes === chunk
    }
    assert.equal(isSeen, text.startsWith('data'))
    assert.notEqual(reader.bytes, chunk)
    assert.equal(reader.next(), undefined)
  }
})
