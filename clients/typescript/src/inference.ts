/** Tensors in, tensors out: the Open Inference Protocol. */
import { credentials, Metadata } from "@grpc/grpc-js";
import { BaseClient } from "./base.js";
import { type CallOptions, type ClientOptions } from "./channel.js";
import { InvalidAnswerError } from "./errors.js";
import {
  GRPCInferenceServiceClient, ModelInferRequest, type ModelInferResponse, type ModelMetadataResponse,
  type ServerReadyResponse,
} from "./gen/inference/grpc_service.js";
import { checkedRevision, modelName, type Selection } from "./names.js";
import { fromRaw, type Tensor, toRaw } from "./tensors.js";

/** The answer of a model to tensors. */
export interface InferResult {
  readonly model: string;
  /** The revision that answered. */
  readonly version: number;
  /** The id that the request had. */
  readonly id: string;
  readonly outputs: readonly Tensor[];
}

/** What `infer` may be told. */
export interface InferOptions extends CallOptions, Omit<Selection, "revision"> {
  /** Revision to run; by default the one that the alias points at. */
  version?: number;
  /** Outputs wanted, by name; by default all. */
  outputs?: readonly string[];
  /** Given back in the answer. */
  id?: string;
}

/** An input or output of a model; -1 in its shape stands for any size. */
export interface TensorInfo {
  readonly name: string;
  readonly datatype: string;
  readonly shape: readonly number[];
}

const SERVICE = "/inference.GRPCInferenceService";

/** Asks an inference server. */
export class InferenceClient extends BaseClient {
  readonly #stub: GRPCInferenceServiceClient;

  constructor(address = "127.0.0.1:8001", options: ClientOptions = {}) {
    super(address, options);
    this.#stub = new GRPCInferenceServiceClient(this.address, credentials.createInsecure(), {
      // The channel has its own credentials already.
      channelOverride: this.channel,
    });
  }

  /**
   * Run a model once.
   *
   * @param inputs A tensor for every input; the first dimension is the batch.
   * @throws InvalidArgumentError An input does not fit the model.
   * @throws NotFoundError There is no such model, version or alias.
   */
  async infer(model: string, inputs: readonly Tensor[], options: InferOptions = {}): Promise<InferResult> {
    modelName(model);
    if (options.version !== undefined && options.alias !== undefined) {
      throw new TypeError("give a version or an alias, not both");
    }
    const metadata = new Metadata();
    if (options.alias !== undefined) metadata.set("pollard-alias", options.alias);
    if (options.stickyKey !== undefined) metadata.set("pollard-sticky-key", options.stickyKey);
    const request = ModelInferRequest.fromPartial({
      modelName: model,
      modelVersion: options.version === undefined ? "" : String(checkedRevision(options.version)),
      id: options.id ?? "",
      inputs: inputs.map(({ name, datatype, shape }) => ({ name, datatype, shape: [...shape] })),
      outputs: (options.outputs ?? []).map((name) => ({ name })),
    });
    // Beside fromPartial, which would copy the bytes one by one.
    request.rawInputContents = inputs.map(toRaw);
    const response = await this.unary<ModelInferResponse>(
      `${SERVICE}/ModelInfer`, options,
      (sent, call, answer) => this.#stub.modelInfer(request, sent, call, answer),
      metadata,
    );
    if (response.rawOutputContents.length !== response.outputs.length) {
      throw new InvalidAnswerError("the server answered with outputs that are not raw");
    }
    return {
      model: response.modelName,
      version: Number(response.modelVersion),
      id: response.id,
      outputs: response.outputs.map(({ name, datatype, shape }, index) =>
        fromRaw(name, datatype, shape, response.rawOutputContents[index] as Buffer),
      ),
    };
  }

  /** Say whether the server takes inference requests. */
  async serverReady(options: CallOptions = {}): Promise<boolean> {
    const response = await this.unary<ServerReadyResponse>(`${SERVICE}/ServerReady`, options, (sent, call, answer) =>
      this.#stub.serverReady({}, sent, call, answer),
    );
    return response.ready;
  }

  /** Describe a model's inputs and outputs. */
  async modelMetadata(
    model: string, options: CallOptions & { version?: number } = {},
  ): Promise<{ versions: readonly string[]; inputs: readonly TensorInfo[]; outputs: readonly TensorInfo[] }> {
    modelName(model);
    const request = { name: model, version: options.version === undefined ? "" : String(options.version) };
    return this.unary<ModelMetadataResponse>(`${SERVICE}/ModelMetadata`, options, (sent, call, answer) =>
      this.#stub.modelMetadata(request, sent, call, answer),
    );
  }
}
