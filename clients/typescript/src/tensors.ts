/** Tensors as typed arrays, and as the bytes that go over the wire. */
import { InvalidAnswerError } from "./errors.js";

/** What the values of a tensor lie in, row by row. */
export type TensorData =
  | Uint8Array | Uint16Array | Uint32Array | BigUint64Array
  | Int8Array | Int16Array | Int32Array | BigInt64Array
  | Float32Array | Float64Array
  | readonly Uint8Array[];

/** A tensor: BOOL is a Uint8Array, FP16 and BF16 are Uint16Arrays of their bits, BYTES a list of Uint8Arrays. */
export interface Tensor {
  readonly name: string;
  /** As the protocol names it, such as "UINT8" or "FP32". */
  readonly datatype: string;
  readonly shape: readonly number[];
  readonly data: TensorData;
}

type TypedArray = Exclude<TensorData, readonly Uint8Array[]>;
interface TypedArrayType {
  readonly BYTES_PER_ELEMENT: number;
  new (buffer: ArrayBuffer): TypedArray;
}

const TYPES: Readonly<Record<string, TypedArrayType>> = {
  BOOL: Uint8Array,
  UINT8: Uint8Array,
  UINT16: Uint16Array,
  UINT32: Uint32Array,
  UINT64: BigUint64Array,
  INT8: Int8Array,
  INT16: Int16Array,
  INT32: Int32Array,
  INT64: BigInt64Array,
  FP16: Uint16Array,
  BF16: Uint16Array,
  FP32: Float32Array,
  FP64: Float64Array,
};

/** The bytes of a tensor; throws TypeError when data, datatype and shape do not fit. */
export function toRaw({ name, datatype, shape, data }: Tensor): Buffer {
  const count = shape.reduce((product, size) => product * size, 1);
  if (data.length !== count) {
    throw new TypeError(`tensor "${name}" has ${data.length} values, but its shape [${shape.join(", ")}] has ${count}`);
  }
  if (datatype === "BYTES") {
    if (ArrayBuffer.isView(data)) throw new TypeError(`tensor "${name}" is BYTES and takes a list of Uint8Arrays`);
    return Buffer.concat(
      data.flatMap((value) => {
        const length = Buffer.alloc(4);
        length.writeUInt32LE(value.length);
        return [length, value];
      }),
    );
  }
  const type = TYPES[datatype];
  if (type === undefined) throw new TypeError(`tensor "${name}" has the unknown datatype "${datatype}"`);
  if (!ArrayBuffer.isView(data) || !(data instanceof (type as unknown as new () => TypedArray))) {
    throw new TypeError(`tensor "${name}" is ${datatype} and takes a ${(type as unknown as { name: string }).name}`);
  }
  return Buffer.from(data.buffer, data.byteOffset, data.byteLength);
}

/** A tensor of an answer. */
export function fromRaw(name: string, datatype: string, shape: readonly number[], raw: Buffer): Tensor {
  if (datatype === "BYTES") {
    const data: Uint8Array[] = [];
    for (let at = 0; at < raw.length; ) {
      const length = at + 4 <= raw.length ? raw.readUInt32LE(at) : raw.length;
      if (at + 4 + length > raw.length) throw new InvalidAnswerError(`output "${name}" ends too early`);
      data.push(raw.subarray(at + 4, at + 4 + length));
      at += 4 + length;
    }
    return { name, datatype, shape, data };
  }
  const type = TYPES[datatype];
  if (type === undefined) throw new InvalidAnswerError(`output "${name}" has the unknown datatype "${datatype}"`);
  const count = shape.reduce((product, size) => product * size, 1);
  if (raw.length !== count * type.BYTES_PER_ELEMENT) {
    throw new InvalidAnswerError(`output "${name}" has ${raw.length} bytes, which do not fit its shape`);
  }
  // Copied, because the bytes may lie at an address that the array type does not allow.
  const copy = new ArrayBuffer(raw.length);
  new Uint8Array(copy).set(raw);
  return { name, datatype, shape, data: new type(copy) };
}
