// Runs one model on ONNX Runtime's WebAssembly build: `node runtimes.mjs PACKAGE < request > answer`.
// Request: {"model": path, "inputs": {name: {"type", "dims", "data": base64}}}.
// Answer: {"version", "outputs": {name: the same}}.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const ort = createRequire(process.argv[2] + "/")("onnxruntime-web");
const ARRAYS = {
  bool: Uint8Array,
  float32: Float32Array,
  int32: Int32Array,
  int64: BigInt64Array,
};

const request = JSON.parse(readFileSync(0, "utf8"));
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";
const session = await ort.InferenceSession.create(readFileSync(request.model), {
  executionProviders: ["wasm"],
});
const feeds = {};
for (const [name, { type, dims, data }] of Object.entries(request.inputs)) {
  const bytes = Uint8Array.from(Buffer.from(data, "base64"));
  feeds[name] = new ort.Tensor(type, new ARRAYS[type](bytes.buffer), dims);
}
const results = await session.run(feeds);
const outputs = {};
for (const [name, { type, dims, data }] of Object.entries(results)) {
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  outputs[name] = { type, dims, data: bytes.toString("base64") };
}
process.stdout.write(JSON.stringify({ version: ort.env.versions.web, outputs }));
