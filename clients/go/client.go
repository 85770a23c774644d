package pollard

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	_ "google.golang.org/grpc/health" // Connections are asked whether their servers are well.
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// Where the services listen unless they are told otherwise.
const (
	DefaultInferenceAddress = "127.0.0.1:8001"
	DefaultVisionAddress    = "127.0.0.1:8011"
	DefaultModelsAddress    = "127.0.0.1:8021"
)

const (
	defaultTimeout         = 30 * time.Second
	defaultMaxAttempts     = 4
	defaultMaxMessageBytes = 64 << 20
)

// Option says how a client is made.
type Option func(*settings)

type settings struct {
	timeout         time.Duration
	maxAttempts     int
	maxMessageBytes int
	tls             *tls.Config
	token           string
	dial            []grpc.DialOption
}

// WithTimeout sets the deadline of calls whose context has none; 30 s without it.
func WithTimeout(timeout time.Duration) Option {
	return func(s *settings) { s.timeout = timeout }
}

// WithMaxAttempts sets how often a call without side effects that meets UNAVAILABLE is sent in all, 1 to 5;
// 4 without it. 1 lets every failure through.
func WithMaxAttempts(attempts int) Option {
	return func(s *settings) { s.maxAttempts = attempts }
}

// WithMaxMessageBytes sets the largest message in either direction; 64 MiB without it.
func WithMaxMessageBytes(limit int) Option {
	return func(s *settings) { s.maxMessageBytes = limit }
}

// WithTLS encrypts the connection; an empty config trusts what the system trusts.
func WithTLS(config *tls.Config) Option {
	return func(s *settings) { s.tls = config }
}

// WithToken sends "authorization: Bearer …" with every call. It needs WithTLS.
func WithToken(token string) Option {
	return func(s *settings) { s.token = token }
}

// WithDialOptions adds options of gRPC's own, such as interceptors.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(s *settings) { s.dial = append(s.dial, options...) }
}

// Methods without side effects.
var retried = map[string][]string{
	"inference.GRPCInferenceService":  {"ServerReady", "ModelMetadata", "ModelInfer"},
	"pollard.vision.v1.VisionService": {"Predict"},
	"pollard.models.v1.ModelService":  {"ListModels"},
}

// client is what all clients share: one connection, and the deadline of calls that give none.
type client struct {
	address string
	timeout time.Duration
	conn    *grpc.ClientConn
}

func dial(address string, options []Option) (*client, error) {
	s := settings{timeout: defaultTimeout, maxAttempts: defaultMaxAttempts, maxMessageBytes: defaultMaxMessageBytes}
	for _, option := range options {
		option(&s)
	}
	if s.timeout <= 0 {
		return nil, fmt.Errorf("pollard: the timeout must be above 0, not %s", s.timeout)
	}
	if s.maxAttempts < 1 || s.maxAttempts > 5 {
		return nil, fmt.Errorf("pollard: the number of attempts must be 1 to 5, not %d", s.maxAttempts)
	}
	dialOptions := []grpc.DialOption{
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(s.maxMessageBytes), grpc.MaxCallSendMsgSize(s.maxMessageBytes)),
		// A server that restarts should be found again in a second.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		// A proxy from the environment must not come between a client and its services.
		grpc.WithNoProxy(),
		// A machine that goes without a word is noticed while a call waits for it.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
	}
	spread := isList(address) || strings.HasPrefix(address, "dns:")
	if spread || s.maxAttempts > 1 {
		dialOptions = append(dialOptions, grpc.WithDefaultServiceConfig(serviceConfig(s.maxAttempts, spread)))
	}
	if s.maxAttempts == 1 {
		dialOptions = append(dialOptions, grpc.WithDisableRetry())
	}
	switch {
	case s.tls != nil:
		dialOptions = append(dialOptions, grpc.WithTransportCredentials(credentials.NewTLS(s.tls)))
	case s.token != "":
		return nil, errors.New("pollard: a token is sent over TLS only; give WithTLS too")
	default:
		// The older of two ways to say it, so that older versions of gRPC serve too.
		dialOptions = append(dialOptions, grpc.WithInsecure())
	}
	if s.token != "" {
		dialOptions = append(dialOptions, grpc.WithPerRPCCredentials(bearer(s.token)))
	}
	target, err := targetOf(address, s.tls != nil, &dialOptions)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.Dial(target, append(dialOptions, s.dial...)...)
	if err != nil {
		return nil, fmt.Errorf("pollard: %w", err)
	}
	return &client{address: address, timeout: s.timeout, conn: conn}, nil
}

// Close closes the connection; calls in flight fail.
func (c *client) Close() error { return c.conn.Close() }

// bounded returns a context that has a deadline, and what gives it back.
func (c *client) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, c.timeout)
}

func isList(address string) bool {
	return strings.Contains(address, ",") && !strings.Contains(address, ":///")
}

// targetOf returns what gRPC dials; for a list of servers it adds the option that tells them.
func targetOf(address string, encrypted bool, options *[]grpc.DialOption) (string, error) {
	if !isList(address) {
		return address, nil
	}
	if encrypted {
		return "", fmt.Errorf("pollard: the addresses %q have no one name that a certificate could be for: with WithTLS give dns:///NAME:PORT", address)
	}
	var servers []resolver.Address
	for _, part := range strings.Split(address, ",") {
		host, port, err := net.SplitHostPort(part)
		ip := net.ParseIP(host)
		number, portErr := strconv.ParseUint(port, 10, 16)
		if err != nil || portErr != nil || number == 0 || ip == nil || (host[0] == '[' || strings.Contains(host, ":")) != (address[0] == '[') {
			return "", fmt.Errorf("pollard: %q of the addresses %q must be an IP address with a port, all of one kind; for names give one that resolves to all servers, as dns:///NAME:PORT", part, address)
		}
		servers = append(servers, resolver.Address{Addr: part})
	}
	list := manual.NewBuilderWithScheme("servers")
	list.InitialState(resolver.State{Addresses: servers})
	*options = append(*options, grpc.WithResolvers(list))
	return "servers:///" + address, nil
}

// serviceConfig says what is sent again. With spread, requests also go in turn to the servers that are there and
// say that they are well; one that cannot be asked counts as well.
func serviceConfig(maxAttempts int, spread bool) string {
	type name struct {
		Service string `json:"service"`
		Method  string `json:"method"`
	}
	var names []name
	for service, methods := range retried {
		for _, method := range methods {
			names = append(names, name{service, method})
		}
	}
	config := map[string]any{}
	if spread {
		config["loadBalancingConfig"] = []any{map[string]any{"round_robin": map[string]any{}}}
		config["healthCheckConfig"] = map[string]any{"serviceName": ""}
	}
	if maxAttempts > 1 {
		config["methodConfig"] = []any{map[string]any{
			"name": names,
			"retryPolicy": map[string]any{
				"maxAttempts":       maxAttempts,
				"initialBackoff":    "0.1s",
				"maxBackoff":        "2s",
				"backoffMultiplier": 2.0,
				// gRPC's servers cancel what reaches them while they stop, before it has begun.
				"retryableStatusCodes": []string{"UNAVAILABLE", "CANCELLED"},
			},
		}}
	}
	text, err := json.Marshal(config)
	if err != nil {
		panic(err) // It holds nothing that JSON cannot say.
	}
	return string(text)
}

// bearer is a token as gRPC's credentials.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (bearer) RequireTransportSecurity() bool { return true }

// Selection says which revision of a model a call is for; empty, it is the alias "production".
type Selection struct {
	// Revision is a revision by number; 0 for none.
	Revision int64
	// Alias is an alias, such as "candidate".
	Alias string
	// StickyKey lets calls with the same key get the same revision of a rollout.
	StickyKey string
}

var modelName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

func (s Selection) check(model string) error {
	if !modelName.MatchString(model) {
		return fmt.Errorf("pollard: model name %q is not valid: use 1 to 63 characters out of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit", model)
	}
	if s.Revision < 0 {
		return fmt.Errorf("pollard: revision must be 1 or more, not %d", s.Revision)
	}
	if s.Revision != 0 && s.Alias != "" {
		return errors.New("pollard: give a revision or an alias, not both")
	}
	return nil
}
