// How fast the client asks, against grpc-js's bare stub (bench/clients.py runs it):
// node rate.mjs bare|client ADDRESS SECONDS CALLERS   prints the requests that were answered
import { credentials } from "@grpc/grpc-js";
import { InferenceClient } from "@pollard-ai/client";
import { GRPCInferenceServiceClient, ModelInferRequest } from "../dist/esm/gen/inference/grpc_service.js";

const [mode, address, seconds, callers] = process.argv.slice(2);
const data = new Uint8Array(28 * 28).fill(1);
const shape = [1, 28, 28, 1];
const client = new InferenceClient(address);
const stub = new GRPCInferenceServiceClient(address, credentials.createInsecure());

function bare() {
  const input = { name: "image", datatype: "UINT8", shape };
  const request = ModelInferRequest.fromPartial({ modelName: "digits", inputs: [input] });
  request.rawInputContents = [Buffer.from(data.buffer)];
  return new Promise((resolve, reject) => {
    stub.modelInfer(request, { deadline: Date.now() + 30_000 }, (error, response) => {
      if (error || response.rawOutputContents[0].length !== 40) reject(error);
      else resolve();
    });
  });
}

async function ours() {
  const { outputs } = await client.infer("digits", [{ name: "image", datatype: "UINT8", shape, data }]);
  if (outputs[0].data.length !== 10) throw new Error("an answer of another shape");
}

const ask = mode === "bare" ? bare : ours;
const end = performance.now() + 1000 * Number(seconds);
let answered = 0;
await Promise.all(
  Array.from({ length: Number(callers) }, async () => {
    for (; performance.now() < end; answered++) await ask();
  }),
);
console.log(answered);
client.close();
stub.close();
