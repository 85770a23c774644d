/** Images in, answers out. */
import { readFile } from "node:fs/promises";
import { credentials } from "@grpc/grpc-js";
import { type CallOptions, type ClientOptions } from "./channel.js";
import { BaseClient } from "./base.js";
import { InvalidAnswerError } from "./errors.js";
import { Augmentation, type PredictResponse, VisionServiceClient } from "./gen/pollard/vision/v1/vision_service.js";
import { checkedRevision, checkedSelection, modelName, type Selection } from "./names.js";

/** One class and how likely it is. */
export interface ScoredLabel {
  /** Index of the class. */
  readonly index: number;
  /** Its name; empty when the bundle names no classes. */
  readonly label: string;
  /** 0 to 1 where the bundle says so. */
  readonly score: number;
}

/** A box around something, in pixels of the image as it was sent. */
export interface DetectedObject {
  readonly label: ScoredLabel;
  readonly x1: number;
  readonly y1: number;
  readonly x2: number;
  readonly y2: number;
}

/** The answer for one image. */
export interface Prediction {
  readonly model: string;
  /** The revision that answered. */
  readonly revision: number;
  /** Best first; empty for models that do not classify. */
  readonly labels: readonly ScoredLabel[];
  /** Boxes, best first; undefined for models that do not detect. */
  readonly objects?: readonly DetectedObject[];
  /** The embedding, where it was asked for or is all that the model gives. */
  readonly embedding?: Float32Array;
  /** A PNG of class indices; undefined for models that do not segment. */
  readonly mask?: Uint8Array;
}

/** What `predict` may be told. */
export interface PredictOptions extends CallOptions, Selection {
  /** Number of labels; by default what the bundle says. */
  topK?: number;
  /** Also give the embedding, where the bundle has one. */
  embedding?: boolean;
  /** Boxes with a lower score, 0 to 1, are left out; by default what the bundle says. */
  scoreThreshold?: number;
  /** Average over the image and its mirror image, or over corners and centre. */
  augmentation?: "flip" | "five_crop";
}

const PREDICT = "/pollard.vision.v1.VisionService/Predict";
const AUGMENTATIONS = { flip: Augmentation.AUGMENTATION_FLIP, five_crop: Augmentation.AUGMENTATION_FIVE_CROP };

/** Asks a preprocess server about images. */
export class VisionClient extends BaseClient {
  readonly #stub: VisionServiceClient;

  constructor(address = "127.0.0.1:8011", options: ClientOptions = {}) {
    super(address, options);
    this.#stub = new VisionServiceClient(this.address, credentials.createInsecure(), {
      // The channel has its own credentials already.
      channelOverride: this.channel,
    });
  }

  /**
   * Answer for one image.
   *
   * @param image Path of an image file, or the bytes of one.
   * @throws InvalidArgumentError The image is damaged, empty, too large or none at all.
   * @throws NotFoundError There is no such model, revision or alias.
   */
  async predict(image: string | Uint8Array, model: string, options: PredictOptions = {}): Promise<Prediction> {
    modelName(model);
    checkedSelection(options);
    const { revision, alias } = options;
    const content = typeof image === "string" ? await readFile(image) : Buffer.from(image);
    const request = {
      model: {
        model,
        stickyKey: options.stickyKey ?? "",
        choice:
          revision !== undefined
            ? { $case: "revision" as const, value: checkedRevision(revision) }
            : alias !== undefined
              ? { $case: "alias" as const, value: alias }
              : undefined,
      },
      image: { source: { $case: "content" as const, value: content } },
      options: {
        topK: options.topK ?? 0,
        embedding: options.embedding ?? false,
        scoreThreshold: options.scoreThreshold,
        maskEncoding: 0,
        augmentation: options.augmentation === undefined ? 0 : AUGMENTATIONS[options.augmentation],
      },
    };
    const response = await this.unary<PredictResponse>(PREDICT, options, (metadata, call, answer) =>
      this.#stub.predict(request, metadata, call, answer),
    );
    return prediction(response);
  }
}

function prediction(response: PredictResponse): Prediction {
  const { model, revision, result } = response;
  const found = { model, revision };
  switch (result?.$case) {
    case "classification": {
      const { labels, embedding } = result.value;
      return { ...found, labels, ...(embedding && { embedding: Float32Array.from(embedding.values) }) };
    }
    case "detection":
      return {
        ...found,
        labels: [],
        objects: result.value.objects.map(({ label, x1, y1, x2, y2 }) => ({
          label: label ?? { index: 0, label: "", score: 0 }, x1, y1, x2, y2,
        })),
      };
    case "segmentation":
      return {
        ...found,
        labels: result.value.areas,
        ...(result.value.mask?.$case === "png" && { mask: result.value.mask.value }),
      };
    case "embedding":
      return { ...found, labels: [], embedding: Float32Array.from(result.value.values) };
    default:
      throw new InvalidAnswerError("the server answered with a result that this client does not know");
  }
}
