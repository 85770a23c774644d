package pollard

import (
	"context"
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Error says that a server, or the way to it, answered with a status.
type Error struct {
	// Code is the gRPC status.
	Code codes.Code
	// Message is what the server said.
	Message string
	// Reason is for programs, in upper snake case, such as "REVISION_UNKNOWN"; empty when the server gave none.
	Reason string
	// Domain is who defines the reason: "pollard.ai" for Pollard's services.
	Domain string
	// Metadata holds the values that the message speaks of.
	Metadata map[string]string
	// Method is the gRPC method, such as "/pollard.vision.v1.VisionService/Predict".
	Method string
	// Address is the server's.
	Address string

	status *status.Status
	cause  error
}

// Errors of which errors.Is(err, …) compares the status only. ErrCanceled and ErrDeadlineExceeded come also
// with context.Canceled and context.DeadlineExceeded when it was the caller's context that ended.
var (
	ErrCanceled           = &Error{Code: codes.Canceled}
	ErrUnknown            = &Error{Code: codes.Unknown}
	ErrInvalidArgument    = &Error{Code: codes.InvalidArgument}
	ErrDeadlineExceeded   = &Error{Code: codes.DeadlineExceeded}
	ErrNotFound           = &Error{Code: codes.NotFound}
	ErrAlreadyExists      = &Error{Code: codes.AlreadyExists}
	ErrPermissionDenied   = &Error{Code: codes.PermissionDenied}
	ErrResourceExhausted  = &Error{Code: codes.ResourceExhausted}
	ErrFailedPrecondition = &Error{Code: codes.FailedPrecondition}
	ErrAborted            = &Error{Code: codes.Aborted}
	ErrOutOfRange         = &Error{Code: codes.OutOfRange}
	ErrUnimplemented      = &Error{Code: codes.Unimplemented}
	ErrInternal           = &Error{Code: codes.Internal}
	ErrUnavailable        = &Error{Code: codes.Unavailable}
	ErrDataLoss           = &Error{Code: codes.DataLoss}
	ErrUnauthenticated    = &Error{Code: codes.Unauthenticated}
)

// Error implements error.
func (e *Error) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("pollard: %s", e.Code)
	}
	return fmt.Sprintf("pollard: %s: %s", e.Code, e.Message)
}

// Is says whether target is one of the errors above, of the same status.
func (e *Error) Is(target error) bool {
	other, ok := target.(*Error)
	return ok && other.status == nil && other.Code == e.Code
}

// Unwrap returns the error of the caller's context, where it was that which ended the call.
func (e *Error) Unwrap() error { return e.cause }

// GRPCStatus returns the status with all its details, for status.FromError.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// failure turns what gRPC returned into an *Error.
func failure(ctx context.Context, err error, method, address string) error {
	if err == nil {
		return nil
	}
	found := status.Convert(err)
	made := &Error{Code: found.Code(), Message: found.Message(), Method: method, Address: address, status: found}
	if made.Code == codes.Canceled || made.Code == codes.DeadlineExceeded {
		made.cause = ctx.Err()
	}
	for _, detail := range found.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			made.Reason, made.Domain, made.Metadata = info.Reason, info.Domain, info.Metadata
			break
		}
	}
	return made
}
