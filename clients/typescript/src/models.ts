/** The registry: models, bundles in, rollouts and events as they happen. */
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { type ClientWritableStream, credentials, Metadata, type ServiceError } from "@grpc/grpc-js";
import { BaseClient } from "./base.js";
import { BundleTar } from "./bundle.js";
import { type CallOptions, type ClientOptions } from "./channel.js";
import {
  DeadlineExceededError, failed, fromServiceError, InvalidAnswerError, NotFoundError, OutOfRangeError, AbortedError,
  RequestFailedError, UnavailableError,
} from "./errors.js";
import {
  type Event as EventMessage, type GetRolloutResponse, type GetUploadResponse, type ListEventsResponse,
  type ListModelsResponse, type Model as ModelMessage, ModelServiceClient, type Rollout as RolloutMessage,
  Rollout_State, type UploadBundleResponse, UploadBundleRequest, type WatchEventsResponse,
} from "./gen/pollard/models/v1/model_service.js";
import { lastPart, modelName } from "./names.js";

/** A model of the registry. */
export interface Model {
  readonly name: string;
  readonly description: string;
  readonly labels: Readonly<Record<string, string>>;
  /** Number of the newest revision; 0 when there is none. */
  readonly latestRevision: number;
  /** Revisions by alias. */
  readonly aliases: Readonly<Record<string, number>>;
}

/** A change in the registry. */
export interface RegistryEvent {
  /** Its place in the order of all changes, from 1 on. */
  readonly sequence: number;
  readonly time: Date | undefined;
  /** Who did it. */
  readonly actor: string;
  /** What was done, such as "ALIAS_SET". */
  readonly action: string;
  /** To what, such as "models/digits/aliases/production". */
  readonly resource: string;
  readonly detail: string;
}

/** A new revision on its way to all requests. */
export interface Rollout {
  readonly model: string;
  readonly number: number;
  readonly alias: string;
  readonly revision: number;
  readonly baseRevision: number;
  /** Percent of the requests at each step. */
  readonly steps: readonly number[];
  /** The step that it is at, from 0 on. */
  readonly step: number;
  /** "UNSPECIFIED" also stands for a state that this client does not know, of a newer manager. */
  readonly state: "SHADOW" | "CANARY" | "PAUSED" | "PROMOTED" | "ROLLED_BACK" | "UNSPECIFIED";
  /** Why it was taken back; empty otherwise. */
  readonly error: string;
  /** When it ended; undefined while it goes on. */
  readonly endTime: Date | undefined;
}

/** What `push` stored. */
export interface Pushed {
  readonly model: string;
  readonly revision: number;
  readonly bundleSha256: string;
  /** The model had this bundle already. */
  readonly existed: boolean;
  readonly warnings: readonly string[];
}

/** What `push` may be told. */
export interface PushOptions {
  /** Alias to point at the new revision; by default none. It moves when every server has the revision. */
  alias?: string;
  /** Free text kept with the revision. */
  notes?: string;
  labels?: Readonly<Record<string, string>>;
  /** How long, in milliseconds, nothing may move; by default 60,000. */
  idleTimeoutMs?: number;
  /** UUID of the upload: the same one again goes on where an upload that was broken off ended. */
  uploadId?: string;
  /** Called as bytes go out. */
  onProgress?: (sentBytes: number, totalBytes: number) => void;
  signal?: AbortSignal;
}

/** What `watchEvents` may be told. */
export interface WatchOptions {
  /** Only changes of this model. */
  model?: string;
  /** Sequence of the first event wanted; by default what happens from now on. */
  start?: number;
  /** Milliseconds to go on trying while the manager cannot be reached; by default without end. */
  patienceMs?: number;
  signal?: AbortSignal;
}

const SERVICE = "/pollard.models.v1.ModelService";
const PAGE = 200;
// How long one call of a watch lasts before the next takes over: three signs of life.
const RENEW_MS = 90_000;
const FIRST_PAUSE_MS = 100;
const LAST_PAUSE_MS = 2_000;

/** Asks the model management server. */
export class ModelsClient extends BaseClient {
  readonly #stub: ModelServiceClient;

  constructor(address = "127.0.0.1:8021", options: ClientOptions = {}) {
    super(address, options);
    this.#stub = new ModelServiceClient(this.address, credentials.createInsecure(), {
      // The channel has its own credentials already.
      channelOverride: this.channel,
    });
  }

  /** Yield all models, by name. */
  async *listModels(options: CallOptions = {}): AsyncGenerator<Model, void, undefined> {
    let pageToken = "";
    do {
      const request = { pageSize: PAGE, pageToken, showDeleted: false, filter: "", orderBy: "" };
      const page: ListModelsResponse = await this.unary<ListModelsResponse>(
        `${SERVICE}/ListModels`, options, (metadata, call, answer) =>
          this.#stub.listModels(request, metadata, call, answer),
      );
      for (const message of page.models) yield model(message);
      pageToken = page.nextPageToken;
    } while (pageToken !== "");
  }

  /** The newest changes in the registry, at most 1000, newest first. */
  async listEvents(options: CallOptions & { model?: string; limit?: number } = {}): Promise<RegistryEvent[]> {
    const request = {
      pageSize: options.limit ?? 50,
      pageToken: "",
      model: options.model === undefined ? "" : modelName(options.model),
    };
    const response = await this.unary<ListEventsResponse>(`${SERVICE}/ListEvents`, options, (sent, call, answer) =>
      this.#stub.listEvents(request, sent, call, answer),
    );
    return response.events.map(event);
  }

  /**
   * Yield every change in the registry as it happens, once and in order.
   *
   * A connection that breaks is made again, and the watch goes on where it stood: nothing is lost and nothing
   * comes twice. Leaving the loop ends the watch.
   *
   * @throws UnavailableError The manager could not be reached at the beginning, or not within `patienceMs`.
   * @throws OutOfRangeError Events that the watch has not seen are no longer kept, or `start` lies in the future.
   */
  async *watchEvents(options: WatchOptions = {}): AsyncGenerator<RegistryEvent, void, undefined> {
    const name = options.model === undefined ? "" : modelName(options.model);
    const signal = options.signal === undefined ? {} : { signal: options.signal };
    const method = `${SERVICE}/WatchEvents`;
    let next = options.start ?? 0;
    if (options.start !== undefined && !(Number.isSafeInteger(next) && next >= 1)) {
      throw new RangeError(`start must be 1 or more, not ${next}`);
    }
    let began = false;
    let brokenSince: number | undefined;
    let pause = FIRST_PAUSE_MS;
    for (;;) {
      let heard = false;
      let failure: RequestFailedError;
      try {
        // Each call has an end, so that a connection that died without a word is noticed.
        const timeoutMs = began && brokenSince === undefined ? RENEW_MS : this.timeoutMs;
        const call = this.stream<WatchEventsResponse>(method, { timeoutMs, ...signal }, (metadata, how) =>
          this.#stub.watchEvents({ startSequence: next, model: name }, metadata, how),
        );
        for await (const message of call) {
          heard = began = true;
          brokenSince = undefined;
          pause = FIRST_PAUSE_MS;
          const fresh = message.event !== undefined && message.event.sequence >= next;
          next = Math.max(next, message.sequence + 1);
          if (fresh) yield event(message.event as EventMessage);
        }
        failure = failed("UNAVAILABLE", "the watch was ended by the other side", method, this.address);
      } catch (error) {
        if (!(error instanceof RequestFailedError)) throw error;
        failure = error;
      }
      if (heard && failure instanceof DeadlineExceededError) continue;
      if (this.closed || !began || !mayResume(failure)) throw failure;
      brokenSince ??= Date.now();
      if (options.patienceMs !== undefined && Date.now() - brokenSince >= options.patienceMs) throw failure;
      await sleep(pause, undefined, signal);
      pause = Math.min(pause * 2, LAST_PAUSE_MS);
    }
  }

  /** Say how a rollout stands. */
  async getRollout(modelId: string, number: number, options: CallOptions = {}): Promise<Rollout> {
    const name = `${modelName(modelId)}/rollouts/${number}`;
    const response = await this.unary<GetRolloutResponse>(`${SERVICE}/GetRollout`, options, (sent, call, answer) =>
      this.#stub.getRollout({ name }, sent, call, answer),
    );
    if (response.rollout === undefined) throw new InvalidAnswerError("the server answered without a rollout");
    return rollout(response.rollout);
  }

  /**
   * Yield how a rollout stands, now and after every change of it, until it has ended (PROMOTED or ROLLED_BACK).
   *
   * @throws NotFoundError There is no such model or rollout.
   */
  async *watchRollout(
    modelId: string, number: number, options: Omit<WatchOptions, "model" | "start"> = {},
  ): AsyncGenerator<Rollout, void, undefined> {
    const signal = options.signal === undefined ? {} : { signal: options.signal };
    // The events are watched from before the first look on, so that no change falls between the two.
    const [newest] = await this.listEvents({ limit: 1, ...signal });
    let current = await this.getRollout(modelId, number, signal);
    yield current;
    if (hasEnded(current)) return;
    const name = `${modelName(modelId)}/rollouts/${number}`;
    for await (const change of this.watchEvents({ ...options, model: modelId, start: (newest?.sequence ?? 0) + 1 })) {
      if (change.resource !== name) continue;
      const after = await this.getRollout(modelId, number, signal);
      if (after.state === current.state && after.step === current.step) continue;
      current = after;
      yield current;
      if (hasEnded(current)) return;
    }
  }

  /**
   * Store a bundle as the next revision of a model.
   *
   * Every file is checked against the manifest while it is sent. An upload that breaks goes on from what the
   * server has on disk, until nothing has moved for `idleTimeoutMs`.
   *
   * @param directory The bundle.
   * @param modelId Model name; the model is created when it does not exist.
   * @throws InvalidBundleError The directory is no bundle, or a file differs from its digest.
   * @throws InvalidArgumentError The server's own checks refused the bundle.
   */
  async push(directory: string, modelId: string, options: PushOptions = {}): Promise<Pushed> {
    const parent = modelName(modelId);
    const tar = await BundleTar.open(directory);
    const uploadId = options.uploadId ?? randomUUID();
    const idleMs = options.idleTimeoutMs ?? 60_000;
    const signal = options.signal === undefined ? {} : { signal: options.signal };
    // Asking first costs one round trip and tells a server that is not there at once.
    let offset = await this.#committed(parent, uploadId, signal);
    let furthest = offset;
    let giveUp = Date.now() + idleMs;
    let pause = 200;
    for (;;) {
      let failure: RequestFailedError;
      try {
        const response = await this.#upload(tar, parent, uploadId, offset, idleMs, options);
        return pushed(response, tar.sha256);
      } catch (error) {
        if (!(error instanceof RequestFailedError) || !mayResumeUpload(error)) throw error;
        failure = error;
      }
      for (;;) {
        await sleep(pause, undefined, signal);
        pause = Math.min(pause * 1.5, LAST_PAUSE_MS);
        try {
          offset = await this.#committed(parent, uploadId, signal);
          break;
        } catch (error) {
          if (!(error instanceof UnavailableError || error instanceof DeadlineExceededError)) throw error;
          if (Date.now() >= giveUp) throw failure;
        }
      }
      if (offset > furthest) {
        furthest = offset;
        pause = 200;
        giveUp = Date.now() + idleMs;
      } else if (Date.now() >= giveUp) throw failure;
    }
  }

  async #committed(parent: string, uploadId: string, options: CallOptions): Promise<number> {
    try {
      const response = await this.unary<GetUploadResponse>(`${SERVICE}/GetUpload`, options, (sent, call, answer) =>
        this.#stub.getUpload({ parent, uploadId }, sent, call, answer),
      );
      return response.committedBytes;
    } catch (error) {
      if (error instanceof NotFoundError) return 0;
      throw error;
    }
  }

  /** Make one attempt at an upload that begins at `offset`. */
  async #upload(
    tar: BundleTar, parent: string, uploadId: string, offset: number, idleMs: number, options: PushOptions,
  ): Promise<UploadBundleResponse> {
    const method = `${SERVICE}/UploadBundle`;
    const { signal } = options;
    signal?.throwIfAborted();
    let stalled = false;
    // The check after the last byte of a large bundle may be silent for longer than the sending.
    const idle = setTimeout(() => { stalled = true; call.cancel(); }, idleMs);
    const abort = (): void => call.cancel();
    let settle: { resolve: (value: UploadBundleResponse) => void; reject: (error: Error) => void };
    const answer = new Promise<UploadBundleResponse>((resolve, reject) => { settle = { resolve, reject }; });
    // A refusal may come while pieces are still read; it is looked at after them.
    answer.catch(() => {});
    let ended = false;
    // Lets the sender go on: there is room again, or the call is over.
    let wake = (): void => {};
    const call: ClientWritableStream<UploadBundleRequest> = this.#stub.uploadBundle(
      new Metadata(),
      this.deadline(600_000 + tar.totalBytes / 64),
      (error: ServiceError | null, response: UploadBundleResponse) => {
        ended = true;
        wake();
        if (error === null) settle.resolve(response);
        else if (stalled) {
          const words = `nothing of the upload moved for ${idleMs} ms`;
          settle.reject(failed("DEADLINE_EXCEEDED", words, method, this.address));
        }
        else settle.reject(fromServiceError(error, method, this.address));
      },
    );
    call.on("drain", () => wake());
    signal?.addEventListener("abort", abort, { once: true });
    const send = (message: UploadBundleRequest): Promise<void> =>
      new Promise((resolve) => {
        if (ended || call.write(message)) resolve();
        else wake = resolve;
      });
    try {
      const header = {
        parent, uploadId, writeOffset: offset, totalBytes: tar.totalBytes, bundleSha256: tar.sha256,
        notes: options.notes ?? "", labels: { ...options.labels }, alias: options.alias ?? "",
      };
      await send(UploadBundleRequest.fromPartial({ message: { $case: "header", value: header } }));
      let sent = offset;
      for await (const data of tar.chunks(offset)) {
        if (ended) break;
        await send({ message: { $case: "data", value: data } });
        sent += data.length;
        idle.refresh();
        options.onProgress?.(sent, tar.totalBytes);
      }
      if (!ended) call.end();
      return await answer;
    } catch (error) {
      call.cancel();
      if (signal?.aborted) throw signal.reason;
      throw error;
    } finally {
      clearTimeout(idle);
      signal?.removeEventListener("abort", abort);
    }
  }
}

function pushed(response: UploadBundleResponse, sha256: string): Pushed {
  const found = response.revision;
  if (found === undefined || found.bundleSha256 !== sha256) {
    throw new InvalidAnswerError(`the server stored the bundle ${found?.bundleSha256} instead of ${sha256}`);
  }
  return {
    model: found.name.split("/")[1] ?? "",
    revision: found.revision,
    bundleSha256: found.bundleSha256,
    existed: response.existed,
    warnings: response.warnings,
  };
}

// A transport that breaks shows as UNAVAILABLE, CANCELLED, INTERNAL or UNKNOWN, by where it was cut; what
// Pollard's services themselves say carries a reason.
function mayResume(failure: RequestFailedError): boolean {
  if (failure.code === "UNAVAILABLE" || failure.code === "DEADLINE_EXCEEDED") return true;
  return ["CANCELLED", "INTERNAL", "UNKNOWN"].includes(failure.code) && failure.reason === "";
}

// OUT_OF_RANGE and ABORTED: an earlier attempt of this upload wrote more than was known, or had not ended on
// the server when the next one came.
function mayResumeUpload(failure: RequestFailedError): boolean {
  return failure instanceof OutOfRangeError || failure instanceof AbortedError || mayResume(failure);
}

function hasEnded({ endTime }: Rollout): boolean {
  return endTime !== undefined;
}

function model(message: ModelMessage): Model {
  return {
    name: lastPart(message.name),
    description: message.description,
    labels: message.labels,
    latestRevision: message.latestRevision,
    aliases: Object.fromEntries(message.aliases.map((alias) => [lastPart(alias.name), alias.revision])),
  };
}

function event({ sequence, time, actor, action, resource, detail }: EventMessage): RegistryEvent {
  return { sequence, time, actor, action, resource, detail };
}

function rollout(message: RolloutMessage): Rollout {
  const state = Rollout_State[message.state]?.replace("STATE_", "") ?? "UNSPECIFIED";
  return {
    model: message.name.split("/")[1] ?? "",
    number: Number(lastPart(message.name)),
    alias: lastPart(message.alias),
    revision: message.revision,
    baseRevision: message.baseRevision,
    steps: message.steps,
    step: message.step,
    state: state as Rollout["state"],
    error: message.error?.message ?? "",
    endTime: message.endTime,
  };
}
