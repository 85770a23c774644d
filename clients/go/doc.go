// Package pollard is a client of Pollard's services: images in, answers out (Vision), tensors in, tensors
// out (Inference), and the registry of models (Models).
//
// Every call has a deadline: that of its context or, without one, that of the client (30 s unless
// WithTimeout says otherwise). Calls without side effects that meet UNAVAILABLE are sent again by gRPC's
// service config. What fails is an *Error, which errors.Is compares with ErrNotFound and its like.
//
// A client may be used by many goroutines at once.
package pollard
