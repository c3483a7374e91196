// Reads a disk image through Xen Orchestra's own readers; prints its size and the SHA-256 of what a guest sees.
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { open } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { QCowAccessor, QcowStream } from '@xen-orchestra/qcow2'

const { default: Vhd } = createRequire(import.meta.url)('vhd-lib')

const accessor = {
  openFile: path => open(path),
  closeFile: file => file.close(),
  read: (file, buffer, position) => file.read(buffer, 0, buffer.length, position),
  getSize: async file => (await file.stat()).size,
}

async function qcow2(disk) {
  await disk.init()
  const size = disk.getVirtualSize()
  const block = disk.getBlockSize()
  return { size, block, blocks: disk.diskBlocks('read') }
}

async function* vhdBlocks(disk, count) {
  for (let index = 0; index < count; index++) {
    if (disk.containsBlock(index)) {
      yield { index, data: (await disk._readBlock(index)).data }
    }
  }
}

async function vhd(path) {
  const disk = new Vhd(accessor, await open(path))
  await disk.readHeaderAndFooter()
  await disk.readBlockAllocationTable()
  const block = disk.header.blockSize
  return { size: disk.footer.currentSize, block, blocks: vhdBlocks(disk, disk.header.maxTableEntries) }
}

const readers = {
  qcow2: path => qcow2(new QCowAccessor(accessor, path)),
  'qcow2-stream': path => qcow2(new QcowStream(createReadStream(path))),
  vhd,
}

const [kind, path] = process.argv.slice(2)
const { size, block, blocks } = await readers[kind](path)
const digest = createHash('sha256')
const zeros = Buffer.alloc(block)
let next = 0
const put = data => digest.update(data.subarray(0, Math.min(block, size - next++ * block)))
for await (const { index, data } of blocks) {
  while (next < index) {
    put(zeros)
  }
  put(data)
}
while (next * block < size) {
  put(zeros)
}
console.log(`${size} ${digest.digest('hex')}`)
process.exit(0)
