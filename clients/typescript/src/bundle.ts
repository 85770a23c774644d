/** Bundles as they are sent: the tar of a directory, made while it is read and the same every time. */
import { createHash } from "node:crypto";
import { open, readdir, readFile, stat } from "node:fs/promises";
import path from "node:path";
import { InvalidBundleError } from "./errors.js";

const MANIFEST = "manifest.json";
const SIGNATURE = "signature";
const BLOCK = 512;
/** Size of the pieces in which a bundle is sent. */
export const CHUNK_BYTES = 1 << 20;

/** A run of bytes of the tar: what is given, or a file. */
interface Segment {
  readonly size: number;
  readonly data?: Buffer;
  readonly file?: string;
  /** Of the file, in hexadecimal digits. */
  readonly sha256?: string;
}

/** The tar of a bundle; a broken upload can go on at any byte without the tar ever lying on disk. */
export class BundleTar {
  private constructor(
    private readonly segments: readonly Segment[],
    /** The bundle's digest. */
    readonly sha256: string,
    readonly totalBytes: number,
  ) {}

  /**
   * Look at a bundle, but not into its files; their digests are compared as they are read.
   *
   * @throws InvalidBundleError A file is missing, has another size than the manifest says or is not listed.
   */
  static async open(directory: string): Promise<BundleTar> {
    const raw = await readFile(path.join(directory, MANIFEST)).catch(() => {
      throw new InvalidBundleError(`${directory} holds no ${MANIFEST}, so it is not a bundle`);
    });
    const listed = parse(raw, path.join(directory, MANIFEST));
    await refuseUnlisted(directory, new Set([...listed.keys(), MANIFEST, SIGNATURE]));
    const digest = createHash("sha256").update(raw).digest("hex");
    const segments: Segment[] = [];
    const signed = await stat(path.join(directory, SIGNATURE)).then((found) => found.isFile(), () => false);
    for (const name of [MANIFEST, ...(signed ? [SIGNATURE] : []), ...[...listed.keys()].sort()]) {
      const file = path.join(directory, name);
      const found = await stat(file).catch(() => undefined);
      if (!found?.isFile()) throw new InvalidBundleError(`${file} is missing, but ${MANIFEST} lists it`);
      const entry = listed.get(name);
      if (entry !== undefined && found.size !== entry.size) {
        throw differs(file, `it has ${found.size} bytes and not ${entry.size}`);
      }
      const sha256 = name === MANIFEST ? digest : entry?.sha256;
      const headers = header(name, found.size);
      segments.push({ size: headers.length, data: headers });
      segments.push({ size: found.size, file, ...(sha256 !== undefined && { sha256 }) });
      const padding = -found.size & (BLOCK - 1);
      if (padding > 0) segments.push({ size: padding, data: Buffer.alloc(padding) });
    }
    segments.push({ size: 2 * BLOCK, data: Buffer.alloc(2 * BLOCK) });
    return new BundleTar(segments, digest, segments.reduce((sum, segment) => sum + segment.size, 0));
  }

  /**
   * Yield the bytes of the tar from `offset` on.
   *
   * The end of a file comes only when the file is what the manifest says; the server compares too.
   *
   * @throws InvalidBundleError A file differs from the manifest.
   */
  async *chunks(offset: number): AsyncGenerator<Buffer, void, undefined> {
    let skip = offset;
    for (const segment of this.segments) {
      if (skip >= segment.size) {
        skip -= segment.size;
        continue;
      }
      if (segment.data !== undefined) yield segment.data.subarray(skip);
      else yield* readSegment(segment, skip);
      skip = 0;
    }
  }
}

async function* readSegment(segment: Segment, begin: number): AsyncGenerator<Buffer, void, undefined> {
  const file = segment.file as string;
  const digest = createHash("sha256");
  await using handle = await opened(file);
  for (let at = begin; at < segment.size; ) {
    const chunk = Buffer.allocUnsafe(Math.min(CHUNK_BYTES, segment.size - at));
    const { bytesRead } = await handle.file.read(chunk, 0, chunk.length, at);
    if (bytesRead === 0) throw new InvalidBundleError(`${file} became shorter while it was read`);
    at += bytesRead;
    const piece = chunk.subarray(0, bytesRead);
    digest.update(piece);
    if (at === segment.size && begin === 0 && segment.sha256 !== undefined) {
      const actual = digest.digest("hex");
      if (actual !== segment.sha256) throw differs(file, `its SHA-256 is ${actual}`);
    }
    yield piece;
  }
}

async function opened(name: string): Promise<AsyncDisposable & { file: Awaited<ReturnType<typeof open>> }> {
  const file = await open(name);
  return { file, [Symbol.asyncDispose]: () => file.close() };
}

function differs(file: string, how: string): InvalidBundleError {
  return new InvalidBundleError(`${file} is not the file that ${MANIFEST} lists: ${how}; make the bundle again`);
}

function parse(raw: Buffer, where: string): Map<string, { size: number; sha256: string }> {
  let content: unknown;
  try {
    content = JSON.parse(raw.toString("utf8"));
  } catch (error) {
    throw new InvalidBundleError(`${where} is no readable manifest: ${String(error)}`);
  }
  const files = (content as { files?: unknown } | null)?.files ?? [];
  const listed = new Map<string, { size: number; sha256: string }>();
  for (const each of Array.isArray(files) ? files : []) {
    // Proto3 JSON: 64-bit numbers are strings, and both spellings of a name are allowed.
    const entry = each as Record<string, unknown>;
    const name = String(entry.path ?? "");
    const parts = name.split("/");
    if (parts.some((part) => part === "" || part === "." || part === "..") || name === MANIFEST || listed.has(name)) {
      throw new InvalidBundleError(`${where} lists the unsafe path "${name}"`);
    }
    listed.set(name, {
      size: Number(entry.sizeBytes ?? entry.size_bytes ?? 0),
      sha256: String(entry.sha256 ?? ""),
    });
  }
  return listed;
}

async function refuseUnlisted(directory: string, known: ReadonlySet<string>): Promise<void> {
  for (const entry of await readdir(directory, { recursive: true, withFileTypes: true })) {
    const name = path.relative(directory, path.join(entry.parentPath, entry.name)).split(path.sep).join("/");
    if (!entry.isDirectory() && !known.has(name)) {
      throw new InvalidBundleError(`${path.join(directory, name)} is not listed in ${MANIFEST}`);
    }
  }
}

/** The header of a file in a tar: ustar, after a pax header where the name does not fit. */
function header(name: string, size: number): Buffer {
  const bytes = Buffer.from(name);
  if (bytes.length <= 100 && /^[\x20-\x7e]*$/.test(name)) return ustar(name, size, "0");
  let length = bytes.length + " path=\n".length;
  while (String(length).length + bytes.length + " path=\n".length !== length) length += 1;
  const record = Buffer.from(`${length} path=${name}\n`);
  const padding = Buffer.alloc(-record.length & (BLOCK - 1));
  return Buffer.concat([ustar("pax", record.length, "x"), record, padding, ustar("long", size, "0")]);
}

function ustar(name: string, size: number, type: string): Buffer {
  if (size >= 8 ** 11) throw new InvalidBundleError(`a file of ${size} bytes is too large for a bundle`);
  const block = Buffer.alloc(BLOCK);
  const octal = (value: number, digits: number): string => value.toString(8).padStart(digits, "0") + "\0";
  block.write(name, 0, "latin1");
  block.write(octal(0o644, 7), 100, "latin1");
  block.write(octal(0, 7), 108, "latin1");
  block.write(octal(0, 7), 116, "latin1");
  block.write(octal(size, 11), 124, "latin1");
  block.write(octal(0, 11), 136, "latin1");
  block.write("        ", 148, "latin1");
  block.write(type, 156, "latin1");
  block.write("ustar\0" + "00", 257, "latin1");
  const sum = block.reduce((total, byte) => total + byte, 0);
  block.write(octal(sum, 6) + " ", 148, "latin1");
  return block;
}
