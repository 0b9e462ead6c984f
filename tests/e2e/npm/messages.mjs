// Uses /v1/messages as applications in JavaScript do, and prints what came of it as one object of JSON.
// Arguments: base URL, model.

import Anthropic from "@anthropic-ai/sdk";

const [baseURL, model] = process.argv.slice(2);
const client = new Anthropic({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather like in Paris?" }];
const asked = { model, messages, max_tokens: 60, temperature: 0 };
const found = {};

const whole = await client.messages.create(asked);
found.text = whole.content[0].text;
found.usage = whole.usage;
found.requestId = Boolean(whole._request_id);

found.streamed = "";
found.kinds = [];
for await (const event of await client.messages.create({ ...asked, stream: true })) {
  if (found.kinds.at(-1) !== event.type) found.kinds.push(event.type);
  if (event.type === "content_block_delta") found.streamed += event.delta.text;
}
found.finalText = await client.messages.stream(asked).finalText();

const city = {
  type: "object",
  properties: { city: { type: "string", maxLength: 8 } },
  required: ["city"],
  additionalProperties: false,
};
const weather = { name: "weather", description: "the weather of a city", input_schema: city };
const calling = { ...asked, tools: [weather], tool_choice: { type: "tool", name: "weather" } };
const called = await client.messages.create(calling);
const stream = client.messages.stream(calling);
found.pieces = 0;
found.snapshot = undefined;
stream.on("inputJson", (_, snapshot) => {
  found.pieces += 1;
  found.snapshot = snapshot;
});
const streamedCall = await stream.finalMessage();
found.stopReason = streamedCall.stop_reason;
found.calls = [called, streamedCall].map(({ content }) => ({ name: content[0].name, input: content[0].input }));

const result = { type: "tool_result", tool_use_id: called.content[0].id, content: "rain, 11 degrees" };
const conversation = [
  ...messages,
  { role: "assistant", content: called.content },
  { role: "user", content: [result] },
];
const after = { ...asked, messages: conversation, tools: [weather], tool_choice: { type: "none" } };
found.after = (await client.messages.create(after)).content.map((block) => block.type);
const counting = { model, messages, system: "Be brief." };
found.counted = (await client.messages.countTokens(counting)).input_tokens;
const briefly = await client.messages.create({ ...asked, ...counting, max_tokens: 1 });
found.paidFor = briefly.usage.input_tokens + (briefly.usage.cache_read_input_tokens ?? 0);

found.models = [];
for await (const { id, type } of client.models.list()) found.models.push({ id, type });

async function errorOf(changed, options) {
  try {
    await client.messages.create({ ...asked, ...changed }, options);
  } catch (error) {
    return { name: error.constructor.name, status: error.status, type: error.error?.error?.type, id: Boolean(error.requestID) };
  }
}
found.errors = {
  model: await errorOf({ model: "nothing" }),
  temperature: await errorOf({ temperature: 1.5 }),
  schema: await errorOf({ tools: [{ name: "a b", input_schema: city }] }),
  large: await errorOf({ messages: [{ role: "user", content: "x".repeat(9_000_000) }] }),
  late: await errorOf({ max_tokens: 1000 }, { headers: { "x-request-timeout": "0.1" } }),
};

const left = client.messages.stream({ ...asked, max_tokens: 1000 });
try {
  let seen = 0;
  for await (const event of left) {
    if (event.type === "content_block_delta" && ++seen === 3) left.abort();
  }
} catch (error) {
  found.aborted = error.constructor.name;
}
console.log(JSON.stringify(found));
