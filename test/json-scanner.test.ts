import assert from 'node:assert/strict'
import { test } from 'node:test'
import fc from 'fast-check'
import { edited, inPieces, Pieces } from '../src/wire/edits.ts'
import { free, Gathered } from '../src/wire/gathered.ts'
import {
  JSON_BOUNDS,
  JsonError,
  JsonScanner,
  membersOf,
  outlineOf
} from '../src/wire/json-scanner.ts'
import { turnsOf } from './helper.ts'

/** Scans a text that arrives in pieces of this size; undefined: it is a JSON object. */
function complaint(text: string, size = text.length, bounds = JSON_BOUNDS): string | undefined {
  const bytes = Buffer.from(text)
  const scanner = new JsonScanner(bounds)
  try {
    for (let end = 0; end < bytes.length; ) {
      end = Math.min(end + size, bytes.length)
      scanner.scan(bytes, end)
    }
    scanner.end()
    return undefined
  } catch (error) {
    assert.ok(error instanceof JsonError, String(error))
    return error.message
  }
}

function isObject(text: string): boolean {
  try {
    const value = JSON.parse(text)
    return typeof value === 'object' && value !== null && !Array.isArray(value)
  } catch {
    return false
  }
}

const object = fc.dictionary(fc.string({ unit: 'binary' }), fc.jsonValue())

test('the members of any object are found where they stand, whatever the pieces', () => {
  fc.assert(
    fc.property(object, fc.boolean(), fc.integer({ min: 1, max: 9 }), (given, spaced, size) => {
      const text = JSON.stringify(given, null, spaced ? 2 : 0)
      const bytes = Buffer.from(text)
      assert.equal(complaint(text, size), undefined)
      const found = membersOf(bytes).map(({ name, start, end, elements, last }) => {
        const value = JSON.parse(bytes.toString('utf8', start, end))
        if (Array.isArray(value)) {
          assert.equal(elements, value.length)
          if (elements > 0) {
            const rest = bytes.toString('utf8', last, end - 1)
            assert.deepEqual(JSON.parse(rest), value.at(-1))
          }
        }
        return [name, value]
      })
      assert.deepEqual(found, Object.entries(JSON.parse(text)))
    })
  )
})

test('a text is accepted where JSON.parse accepts it as an object, however it is damaged', () => {
  const damage = fc.record({
    at: fc.nat(),
    removed: fc.integer({ min: 0, max: 3 }),
    added: fc.constantFrom(...'{}[],:"\\0123456789.eE+-truefalsn \t\n\u0001\u007fü')
  })
  fc.assert(
    fc.property(
      object,
      fc.array(damage, { maxLength: 3 }),
      fc.integer({ min: 1, max: 9 }),
      (given, damages, size) => {
        let text = JSON.stringify(given)
        for (const { at, removed, added } of damages) {
          const place = at % (text.length + 1)
          text = text.slice(0, place) + added + text.slice(place + removed)
        }
        // What is no Unicode text cannot arrive as UTF-8.
        fc.pre(text.isWellFormed())
        assert.equal(complaint(text, size) === undefined, isObject(text), text)
      }
    ),
    { numRuns: 2_000 }
  )
})

test('numbers, literals and escapes are read as RFC 8259 says', () => {
  const good = ['0', '-0', '10', '1.5', '-1.50e+10', '1E9', '0e-1', 'true', 'false', 'null']
  const bad = ['01', '-', '+1', '.5', '1.', '1.e3', '1e', '1e+', '0x1', '--1', 'tru', 'True', 'NaN']
  const strings = ['"\\u00e9\\n\\/\\""', '"\\ud83d\\ude00"']
  const badStrings = ['"\\x"', '"\\u12g4"', '"a\nb"', '"\t"', "'a'"]
  for (const value of [...good, ...strings]) {
    for (const size of [1, 100]) assert.equal(complaint(`{"a":${value}}`, size), undefined, value)
  }
  for (const value of [...bad, ...badStrings]) {
    for (const size of [1, 100]) assert.ok(complaint(`{"a":${value}}`, size), value)
  }
})

test('a special byte ends a string wherever it stands, in memory of any alignment', () => {
  for (let offset = 0; offset < 4; offset++) {
    for (let length = 0; length < 80; length++) {
      const text = `{"a":"${'~\xe9'.repeat(length).slice(0, length)}"}`
      const memory = Buffer.alloc(offset + 400)
      const view = memory.subarray(offset, offset + Buffer.byteLength(text))
      view.write(text)
      const end = view.length - 2
      assert.equal(membersOf(view)[0]!.end, end + 1, `${offset} ${length}`)
      for (const [special, problem] of [
        ['\n', /control character/],
        ['\\', /./],
        ['"', /./]
      ] as const) {
        if (length === 0) continue
        view.write(special, end - 1)
        assert.throws(() => membersOf(view), problem, `${offset} ${length} ${special}`)
      }
    }
  }
})

test('an error says where it is and what was expected, and repeats nothing', () => {
  assert.equal(complaint('{"password": hunter2}'), 'byte 14 must be a value')
  assert.equal(complaint('[1]'), 'byte 1 must be "{"')
  assert.equal(complaint('{"a":1 "b":2}'), 'byte 8 must be "," or "}"')
  assert.equal(complaint('{"a":1}{'), 'byte 8 must be the end of the text')
  assert.equal(complaint('{"a":1'), 'it ends too early')
})

test('depth, members and nodes are bounded', () => {
  const bounds = { depth: 3, members: 2, nodes: 6 }
  assert.equal(complaint('{"a":[[1]]}', 1, bounds), undefined)
  assert.match(complaint('{"a":[[[1]]]}', 1, bounds)!, /more than 3 levels/)
  assert.match(complaint('{"a":1,"b":2,"c":3}', 1, bounds)!, /more than 2 members/)
  assert.equal(complaint('{"a":[{},{},{},{}]}', 1, { ...bounds, nodes: 7 }), undefined)
  assert.match(complaint('{"a":[{},{},{},{}]}', 1, bounds)!, /more than 6 objects/)
  assert.equal(complaint(`{"a":[${Array(1000).fill('1')}]}`, 7, bounds), undefined)
})

test('a long name is cut, and ends where it ends', () => {
  const bytes = Buffer.from(JSON.stringify({ [`"${'n'.repeat(1000)}`]: 1, b: 2 }))
  const [long, other] = membersOf(bytes)
  assert.equal(long!.name.length, 255)
  assert.equal(other!.name, 'b')
})

test('a name of a link or of media is noted at any level, and no value is', () => {
  const hasLinks = (json: string) => outlineOf(Buffer.from(json)).hasLinks
  for (const json of [
    '{"url":1}',
    '{"a":[{"b":{"image_url":{}}}]}',
    '{"a":{"file_id":"x"}}',
    '{"file":"x"}',
    '{"a":[{"imageURL":1}]}',
    '{"a":[{"type":"video","video":"x"}]}',
    '{"input_ur\\u006c":1}'
  ]) {
    assert.equal(hasLinks(json), true, json)
  }
  for (const json of [
    '{}',
    '{"a":"url"}',
    '{"a":["file"]}',
    '{"urls":1}',
    '{"profile":1}',
    '{"ur":"l"}'
  ]) {
    assert.equal(hasLinks(json), false, json)
  }
})

test('edits give the same bytes in one buffer and in pieces, more than once', async () => {
  const change = (start: number, end: number, text: string) => ({
    start,
    end,
    bytes: Buffer.from(text)
  })
  const small = edited(Buffer.from('0123456789'), [
    change(8, 8, 'A'),
    change(8, 9, 'B'),
    change(1, 3, '')
  ])
  assert.ok(Buffer.isBuffer(small))
  assert.equal(small.toString(), '034567AB9')
  const long = Buffer.alloc(100_000, 'x')
  const large = edited(long, [change(0, 0, '<'), change(99_999, 100_000, '>')])
  assert.ok(large instanceof Pieces)
  assert.equal(large.length, 100_001)
  for (let time = 1; time <= 2; time++) {
    assert.equal(large.isTaken, time > 1)
    const pieces = await all(large)
    assert.equal(Buffer.concat(pieces).toString(), `<${'x'.repeat(99_999)}>`)
    assert.equal(pieces[1]!.buffer, long.buffer, 'a large body is not copied')
  }
})

async function all(pieces: Pieces): Promise<Buffer[]> {
  const taken: Buffer[] = []
  for await (const piece of pieces) taken.push(piece)
  return taken
}

test('a large body is sent a megabyte at a time, in as many turns', async () => {
  const bytes = Buffer.alloc(2_500_000, 'x')
  assert.ok(Buffer.isBuffer(inPieces(bytes.subarray(0, 65_536))))
  const body = inPieces(bytes) as Pieces
  const sizes = async (pieces: Pieces) => {
    let taken: Buffer[] = []
    const turns = await turnsOf(async () => {
      taken = await all(pieces)
    })
    return [turns, ...taken.map(({ length }) => length)]
  }
  assert.deepEqual(await sizes(body), [2, 1048576, 1048576, 402848])
  const edits = [{ start: 5, end: 6, bytes: Buffer.from('y') }]
  const few = edited(bytes.subarray(0, 100_000), edits) as Pieces
  assert.deepEqual(await sizes(few), [0, 5, 1, 99_994])
  assert.equal(body.length, bytes.length)
  body.release()
  assert.deepEqual(await sizes(body), [0])
  assert.equal(inPieces(undefined), undefined)
})

test('a body is gathered from pieces of any size', () => {
  const sizes = [1, 15, 2, 40, 100_000, 3]
  const body = new Gathered(16, 200_000)
  for (const [at, size] of sizes.entries()) body.add(Buffer.alloc(size, String(at)))
  const bytes = body.bytes
  assert.equal(bytes.toString(), sizes.map((size, at) => String(at).repeat(size)).join(''))
})

test('the memory of a very large body is freed at once', () => {
  const gathered = (size: number) => {
    const body = new Gathered(size, size)
    for (let left = size; left > 0; left -= 65_536) body.add(Buffer.alloc(Math.min(left, 65_536)))
    return body.bytes
  }
  const sizes = [1_000_000, 20_000_000].map(size => {
    const bytes = gathered(size)
    free(bytes)
    return bytes.length
  })
  assert.deepEqual(sizes, [1_000_000, 0])
})

test('a body that outgrows its buffers keeps every byte', () => {
  fc.assert(
    fc.property(fc.integer({ min: 100, max: 1_500_000 }), fc.boolean(), (size, isKnown) => {
      const total = 2_500_000
      const body = new Gathered(isKnown ? total : 16 * 1024, total)
      for (let at = 0; at < total; at += size) {
        body.add(Buffer.alloc(Math.min(size, total - at), at / size))
      }
      const { bytes } = body
      assert.equal(bytes.length, total)
      for (let at = 0; at < total; at += 9_999) assert.equal(bytes[at], Math.floor(at / size) % 256)
    }),
    {
      numRuns: 20,
      examples: [
        [65_536, true],
        [16_384, false],
        [700_000, true]
      ] as never
    }
  )
})
