// What llama.cpp makes of a GGUF, through node-llama-cpp's prebuilt library.
// Standard input: {"modules": FOLDER, "gguf": FILE, "texts": [...], "prompts": [[id, ...]], "tokens": N,
//                  "probabilities": [[id, ...]]}
// Standard output: {"ids": of each text, "answers": N greedy ids after each prompt,
//                   "probabilities": [[p, ...] of the whole vocabulary, after each position of a sequence]}
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const asked = JSON.parse(await new Response(process.stdin).text());
const require = createRequire(asked.modules + "/package.json");
const { getLlama } = await import(pathToFileURL(require.resolve("node-llama-cpp")));

const llama = await getLlama({ gpu: false, build: "never", maxThreads: 2, logLevel: "error" });
const model = await llama.loadModel({ modelPath: asked.gguf });
const size = Math.min(model.trainContextSize, 512);
const context = await model.createContext({ contextSize: size, threads: 2, batchSize: size });
const sequence = context.getSequence();

const ids = (asked.texts ?? []).map((text) => model.tokenize(text, true));
const answers = [];
for (const prompt of asked.prompts ?? []) {
  await sequence.clearHistory();
  const answer = [];
  for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    answer.push(token);
    if (answer.length >= asked.tokens) break;
  }
  answers.push(answer);
}
const probabilities = [];
for (const tokens of asked.probabilities ?? []) {
  await sequence.clearHistory();
  const steps = tokens.map((token) => [token, { generateNext: { probabilities: true } }]);
  const results = await sequence.controlledEvaluate(steps);
  for (const { next } of results) {
    const row = new Array(next.probabilities.size).fill(0);
    for (const [token, p] of next.probabilities) row[token] = p;
    probabilities.push(row);
  }
}
process.stdout.write(JSON.stringify({ ids, answers, probabilities }), () => process.exit(0));
