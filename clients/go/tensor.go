package pollard

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Tensor is an array of numbers, as the protocol carries it.
type Tensor struct {
	Name string
	// Datatype is the protocol's, such as "UINT8" or "FP32".
	Datatype string
	Shape    []int64
	// Raw holds the values row by row, little-endian. NewTensor writes it and Values reads it.
	Raw []byte
}

// Number is what NewTensor and Values know to write and read.
type Number interface {
	bool | uint8 | uint16 | uint32 | uint64 | int8 | int16 | int32 | int64 | float32 | float64
}

func datatype[T Number]() string {
	var zero T
	switch any(zero).(type) {
	case bool:
		return "BOOL"
	case uint8:
		return "UINT8"
	case uint16:
		return "UINT16"
	case uint32:
		return "UINT32"
	case uint64:
		return "UINT64"
	case int8:
		return "INT8"
	case int16:
		return "INT16"
	case int32:
		return "INT32"
	case int64:
		return "INT64"
	case float32:
		return "FP32"
	default:
		return "FP64"
	}
}

// NewTensor makes a tensor of values, row by row; their type gives its datatype.
func NewTensor[T Number](name string, shape []int64, values []T) (Tensor, error) {
	if count := elements(shape); count != int64(len(values)) {
		return Tensor{}, fmt.Errorf("pollard: tensor %q has %d values, but its shape %v has %d", name, len(values), shape, count)
	}
	tensor := Tensor{Name: name, Datatype: datatype[T](), Shape: shape}
	if raw, ok := any(values).([]uint8); ok {
		tensor.Raw = raw
		return tensor, nil
	}
	var buffer bytes.Buffer
	if err := binary.Write(&buffer, binary.LittleEndian, values); err != nil {
		return Tensor{}, fmt.Errorf("pollard: tensor %q: %w", name, err)
	}
	tensor.Raw = buffer.Bytes()
	return tensor, nil
}

// Values returns the values of a tensor; T must be the type of its datatype.
func Values[T Number](tensor Tensor) ([]T, error) {
	if want := datatype[T](); tensor.Datatype != want {
		return nil, fmt.Errorf("pollard: tensor %q is %s and not %s", tensor.Name, tensor.Datatype, want)
	}
	var zero T
	count := elements(tensor.Shape)
	if size := int64(binary.Size(zero)); count < 0 || int64(len(tensor.Raw)) != count*size {
		return nil, fmt.Errorf("pollard: tensor %q has %d bytes, which do not fit its shape %v", tensor.Name, len(tensor.Raw), tensor.Shape)
	}
	values := make([]T, count)
	if err := binary.Read(bytes.NewReader(tensor.Raw), binary.LittleEndian, values); err != nil {
		return nil, fmt.Errorf("pollard: tensor %q: %w", tensor.Name, err)
	}
	return values, nil
}

func elements(shape []int64) int64 {
	count := int64(1)
	for _, size := range shape {
		count *= size
	}
	return count
}
