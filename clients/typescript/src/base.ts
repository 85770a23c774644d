/** What all clients share: one channel, deadlines, typed errors. */
import {
  type CallOptions as GrpcCallOptions, Channel, type ClientReadableStream, type ClientUnaryCall, Metadata,
  type ServiceError,
} from "@grpc/grpc-js";
import {
  type CallOptions, channelCredentials, channelOptions, checkedAddress, checkedTimeout, type ClientOptions,
  DEFAULT_TIMEOUT_MS,
} from "./channel.js";
import { fromServiceError } from "./errors.js";

type Answer<T> = (error: ServiceError | null, response: T) => void;

/** One channel to one server, or to several. Many requests may be in flight at once over one client. */
export abstract class BaseClient implements Disposable {
  readonly address: string;
  protected readonly channel: Channel;
  protected readonly timeoutMs: number;
  protected closed = false;

  constructor(address: string, options: ClientOptions = {}) {
    this.address = checkedAddress(address, Boolean(options.tls));
    this.timeoutMs = checkedTimeout(options.timeoutMs ?? DEFAULT_TIMEOUT_MS);
    this.channel = new Channel(this.address, channelCredentials(options), channelOptions(options, this.address));
  }

  /** Close the channel. Requests in flight go on to their end; abort them by their signals. */
  close(): void {
    this.closed = true;
    this.channel.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  protected deadline(timeoutMs: number): Partial<GrpcCallOptions> {
    if (this.closed) throw new Error(`this ${this.constructor.name} is closed`);
    return { deadline: Date.now() + checkedTimeout(timeoutMs) };
  }

  /** Make a unary call. */
  protected unary<T>(
    method: string,
    options: CallOptions,
    start: (metadata: Metadata, options: Partial<GrpcCallOptions>, answer: Answer<T>) => ClientUnaryCall,
    metadata: Metadata = new Metadata(),
  ): Promise<T> {
    const { signal } = options;
    return new Promise<T>((resolve, reject) => {
      signal?.throwIfAborted();
      const abort = (): void => call.cancel();
      const call = start(metadata, this.deadline(options.timeoutMs ?? this.timeoutMs), (error, response) => {
        signal?.removeEventListener("abort", abort);
        if (error === null) resolve(response);
        else if (signal?.aborted) reject(signal.reason as Error);
        else reject(fromServiceError(error, method, this.address));
      });
      signal?.addEventListener("abort", abort, { once: true });
    });
  }

  /** Yield the messages of a server stream; leaving the loop ends the call. */
  protected async *stream<T>(
    method: string,
    options: CallOptions,
    start: (metadata: Metadata, options: Partial<GrpcCallOptions>) => ClientReadableStream<T>,
  ): AsyncGenerator<T, void, undefined> {
    const { signal } = options;
    signal?.throwIfAborted();
    const call = start(new Metadata(), this.deadline(options.timeoutMs ?? this.timeoutMs));
    const abort = (): void => call.cancel();
    signal?.addEventListener("abort", abort, { once: true });
    try {
      for await (const message of call) yield message as T;
    } catch (error) {
      if (signal?.aborted) throw signal.reason;
      throw fromServiceError(error as ServiceError, method, this.address);
    } finally {
      signal?.removeEventListener("abort", abort);
      // An error without a listener would end the process.
      call.on("error", () => {});
      call.cancel();
    }
  }
}
