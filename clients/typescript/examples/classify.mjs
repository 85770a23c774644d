// Ask a served model about images: node classify.mjs MODEL IMAGE…
import { NotFoundError, PollardError, VisionClient } from "@pollard-ai/client";

const [model, ...images] = process.argv.slice(2);
if (images.length === 0) {
  console.error("usage: node classify.mjs MODEL IMAGE…");
  process.exit(2);
}
const vision = new VisionClient(process.env.POLLARD_VISION_ADDRESS ?? "127.0.0.1:8011");
try {
  for (const image of images) {
    const { labels, revision } = await vision.predict(image, model, { topK: 3, timeoutMs: 10_000 });
    const best = labels.map(({ label, score }) => `${label} ${(100 * score).toFixed(1)}%`).join(", ");
    console.log(`${image}: ${best} (revision ${revision})`);
  }
} catch (error) {
  if (!(error instanceof PollardError)) throw error;
  console.error(error instanceof NotFoundError ? `push a model first: ${error.message}` : error.message);
  process.exitCode = 1;
} finally {
  vision.close();
}
