/**
 * Pollard's client for Node.
 *
 *     import { VisionClient } from "@pollard-ai/client";
 *
 *     using vision = new VisionClient("127.0.0.1:8011");
 *     const prediction = await vision.predict("rose.jpg", "flowers");
 *     console.log(prediction.labels[0]);
 *
 * Every request has a deadline, and every failure is a class of `./errors`.
 */
export { type CallOptions, type ClientOptions, type Tls } from "./channel.js";
export {
  AbortedError, AlreadyExistsError, CancelledError, type Code, DataLossError, DeadlineExceededError,
  type ErrorDetails, FailedPreconditionError, InternalError, InvalidAnswerError, InvalidArgumentError,
  InvalidBundleError, NotFoundError, OutOfRangeError, PermissionDeniedError, PollardError, RequestFailedError,
  ResourceExhaustedError, UnauthenticatedError, UnavailableError, UnimplementedError, UnknownError,
} from "./errors.js";
export { InferenceClient, type InferOptions, type InferResult, type TensorInfo } from "./inference.js";
export {
  type Model, ModelsClient, type Pushed, type PushOptions, type RegistryEvent, type Rollout, type WatchOptions,
} from "./models.js";
export { type Selection } from "./names.js";
export { type Tensor, type TensorData } from "./tensors.js";
export {
  type DetectedObject, type Prediction, type PredictOptions, type ScoredLabel, VisionClient,
} from "./vision.js";
