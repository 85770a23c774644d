package ai.pollard.client;

import com.google.protobuf.ByteString;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.List;

/**
 * An array of numbers, as the protocol carries it.
 *
 * @param name of the input or output
 * @param datatype as the protocol names it, such as "UINT8" or "FP32"
 * @param shape sizes; their product is the number of values
 * @param raw the values row by row, little-endian
 */
public record Tensor(String name, String datatype, List<Long> shape, ByteString raw) {
  /** A UINT8 tensor. */
  public static Tensor of(String name, List<Long> shape, byte[] values) {
    check(name, shape, values.length);
    return new Tensor(name, "UINT8", shape, ByteString.copyFrom(values));
  }

  /** An FP32 tensor. */
  public static Tensor of(String name, List<Long> shape, float[] values) {
    check(name, shape, values.length);
    ByteBuffer buffer = ByteBuffer.allocate(4 * values.length).order(ByteOrder.LITTLE_ENDIAN);
    buffer.asFloatBuffer().put(values);
    return new Tensor(name, "FP32", shape, ByteString.copyFrom(buffer));
  }

  /** An INT64 tensor. */
  public static Tensor of(String name, List<Long> shape, long[] values) {
    check(name, shape, values.length);
    ByteBuffer buffer = ByteBuffer.allocate(8 * values.length).order(ByteOrder.LITTLE_ENDIAN);
    buffer.asLongBuffer().put(values);
    return new Tensor(name, "INT64", shape, ByteString.copyFrom(buffer));
  }

  /** The values of a UINT8 tensor. */
  public byte[] bytes() {
    buffer("UINT8", 1);
    return raw.toByteArray();
  }

  /** The values of an FP32 tensor. */
  public float[] floats() {
    ByteBuffer buffer = buffer("FP32", 4);
    float[] values = new float[raw.size() / 4];
    buffer.asFloatBuffer().get(values);
    return values;
  }

  /** The values of an INT64 tensor. */
  public long[] longs() {
    ByteBuffer buffer = buffer("INT64", 8);
    long[] values = new long[raw.size() / 8];
    buffer.asLongBuffer().get(values);
    return values;
  }

  private ByteBuffer buffer(String wanted, int size) {
    if (!datatype.equals(wanted)) {
      throw new IllegalStateException("tensor " + name + " is " + datatype + " and not " + wanted);
    }
    if (raw.size() != count(shape) * size) {
      throw new IllegalStateException(
          "tensor " + name + " has " + raw.size() + " bytes, which do not fit its shape " + shape);
    }
    return raw.asReadOnlyByteBuffer().order(ByteOrder.LITTLE_ENDIAN);
  }

  private static void check(String name, List<Long> shape, int length) {
    if (count(shape) != length) {
      throw new IllegalArgumentException(
          "tensor " + name + " has " + length + " values, but its shape " + shape + " has " + count(shape));
    }
  }

  private static long count(List<Long> shape) {
    return shape.stream().reduce(1L, Math::multiplyExact);
  }
}
