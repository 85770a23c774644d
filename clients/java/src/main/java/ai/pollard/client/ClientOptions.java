package ai.pollard.client;

import java.nio.file.Path;
import java.time.Duration;
import java.util.Objects;
import java.util.Optional;

/**
 * How a client is made. Each method returns another object and leaves this one as it is.
 *
 * @param timeout deadline of calls that give none
 * @param maxAttempts how often a call without side effects that meets UNAVAILABLE is sent in all, 1 to 5
 * @param maxMessageBytes largest message in either direction
 * @param encrypted whether the connection is encrypted
 * @param authorities PEM file of the authorities that may have signed the server's certificate; without it those that
 *     Java trusts
 * @param token sent with every call as "authorization: Bearer …"; needs an encrypted connection
 */
public record ClientOptions(
    Duration timeout,
    int maxAttempts,
    int maxMessageBytes,
    boolean encrypted,
    Optional<Path> authorities,
    Optional<String> token) {

  /** 30 s, four attempts, 64 MiB, a plain connection. */
  public ClientOptions() {
    this(Duration.ofSeconds(30), 4, 64 << 20, false, Optional.empty(), Optional.empty());
  }

  /** Checks the values. */
  public ClientOptions {
    Objects.requireNonNull(authorities);
    if (timeout.isNegative() || timeout.isZero()) {
      throw new IllegalArgumentException("timeout must be above 0, not " + timeout);
    }
    if (maxAttempts < 1 || maxAttempts > 5) {
      throw new IllegalArgumentException("maxAttempts must be 1 to 5, not " + maxAttempts);
    }
    if (token.isPresent() && !encrypted) {
      throw new IllegalArgumentException("a token is sent over TLS only; call withTls first");
    }
  }

  /** With another deadline for calls that give none. */
  public ClientOptions withTimeout(Duration value) {
    return new ClientOptions(value, maxAttempts, maxMessageBytes, encrypted, authorities, token);
  }

  /** With another number of attempts; 1 lets every failure through. */
  public ClientOptions withMaxAttempts(int value) {
    return new ClientOptions(timeout, value, maxMessageBytes, encrypted, authorities, token);
  }

  /** With another limit of messages. */
  public ClientOptions withMaxMessageBytes(int value) {
    return new ClientOptions(timeout, maxAttempts, value, encrypted, authorities, token);
  }

  /** With an encrypted connection to a server whose certificate Java trusts. */
  public ClientOptions withTls() {
    return new ClientOptions(timeout, maxAttempts, maxMessageBytes, true, authorities, token);
  }

  /** With an encrypted connection to a server whose certificate one of these authorities signed. */
  public ClientOptions withTls(Path authorities) {
    return new ClientOptions(
        timeout, maxAttempts, maxMessageBytes, true, Optional.of(authorities), token);
  }

  /** With a token; call {@code withTls} first. */
  public ClientOptions withToken(String value) {
    return new ClientOptions(
        timeout, maxAttempts, maxMessageBytes, encrypted, authorities, Optional.of(value));
  }
}
