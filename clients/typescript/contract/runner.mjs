// The contract runner: node runner.mjs PLAN (see tests/contract/README.md).
import { readFileSync } from "node:fs";
import { InferenceClient, ModelsClient, RequestFailedError, VisionClient } from "@pollard-ai/client";

const ARRAYS = { UINT8: Uint8Array, FP32: Float32Array, INT64: BigInt64Array };

function options({ timeout_seconds, max_attempts, max_message_bytes, ca_file, token }) {
  return {
    ...(timeout_seconds !== undefined && { timeoutMs: timeout_seconds * 1000 }),
    ...(max_attempts !== undefined && { maxAttempts: max_attempts }),
    ...(max_message_bytes !== undefined && { maxMessageBytes: max_message_bytes }),
    ...(ca_file !== undefined && { tls: { caFile: ca_file } }),
    ...(token !== undefined && { token }),
  };
}

const CLIENTS = {
  predict: VisionClient, infer: InferenceClient,
  list_models: ModelsClient, watch_events: ModelsClient, watch_rollout: ModelsClient, push: ModelsClient,
};

const CALLS = {
  async predict(vision, { image_path, model, revision, alias, top_k }, signal) {
    const call = { signal, ...(revision && { revision }), ...(alias && { alias }), ...(top_k && { topK: top_k }) };
    return vision.predict(image_path, model, call);
  },
  async infer(inference, { model, inputs, version, alias, id }, signal) {
    const tensors = inputs.map(({ data, ...rest }) => ({ ...rest, data: ARRAYS[rest.datatype].from(data) }));
    const call = { signal, ...(version && { version }), ...(alias && { alias }), ...(id && { id }) };
    const { outputs, ...answer } = await inference.infer(model, tensors, call);
    return { ...answer, outputs: outputs.map(({ data, ...rest }) => ({ ...rest, data: Array.from(data, Number) })) };
  },
  async list_models(models, _, signal) {
    const listed = [];
    for await (const { name, latestRevision } of models.listModels({ signal })) {
      listed.push({ name, latest_revision: latestRevision });
    }
    return { models: listed };
  },
  async watch_events(models, { model, start, count }, signal) {
    const events = [];
    for await (const event of models.watchEvents({ model, start, signal })) {
      events.push(event);
      if (events.length === count) break;
    }
    return { events };
  },
  async watch_rollout(models, { model, rollout }, signal) {
    const rollouts = [];
    for await (const { revision, baseRevision, state } of models.watchRollout(model, rollout, { signal })) {
      rollouts.push({ revision, base_revision: baseRevision, state });
    }
    return { rollouts };
  },
  async push(models, { bundle, model }, signal) {
    return models.push(bundle, model, { signal });
  },
};

for (const { case: name, call, address, client, arguments: given, requests, cancel_after_seconds } of JSON.parse(
  readFileSync(process.argv[2], "utf8"),
).cases) {
  let line;
  const controller = new AbortController();
  const timer = cancel_after_seconds && setTimeout(() => controller.abort(), cancel_after_seconds * 1000);
  let made;
  try {
    made = new CLIENTS[call](address, options(client));
    for (let more = requests ?? 1; more > 1; more--) await CALLS[call](made, given, controller.signal);
    line = { case: name, answer: await CALLS[call](made, given, controller.signal) };
  } catch (error) {
    if (error.name === "AbortError") line = { case: name, error: { code: "CANCELLED" } };
    else if (error instanceof RequestFailedError) {
      const { code, message, reason, domain, metadata } = error;
      line = { case: name, error: { code, message, reason, domain, metadata } };
    } else if (made === undefined) line = { case: name, refused: { message: error.message } };
    else throw error;
  } finally {
    clearTimeout(timer);
    made?.close();
  }
  console.log(JSON.stringify(line));
}
