// Uses a server as applications in JavaScript do, and prints what came of it as one object of JSON.
// Arguments: base URL, model.

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Name one colour." }];
const asked = { model, messages, temperature: 0, max_tokens: 12 };
const found = {};

const whole = await client.chat.completions.create(asked);
found.text = whole.choices[0].message.content;
found.usage = whole.usage;

found.streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  found.streamed += chunk.choices[0].delta.content ?? "";
}
found.finalContent = await client.chat.completions.stream(asked).finalContent();

const weather = {
  type: "function",
  function: {
    name: "weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 8 } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};
const calling = {
  ...asked,
  max_tokens: 60,
  tools: [weather],
  tool_choice: { type: "function", function: { name: "weather" } },
};
const runner = client.chat.completions.stream(calling);
found.calls = (await runner.finalMessage()).tool_calls.map((call) => call.function);

const Person = z.object({ name: z.enum(["Bo", "Al"]), old: z.boolean() });
const parsed = await client.chat.completions.parse({
  ...asked,
  max_tokens: 60,
  response_format: zodResponseFormat(Person, "person"),
});
found.parsed = parsed.choices[0].message.parsed;

const response = await client.responses.create({ model, input: "Hi", max_output_tokens: 8 });
found.response = response.output_text;
found.events = [];
const events = client.responses.stream({ model, input: "Hi", max_output_tokens: 8 });
for await (const event of events) {
  found.events.push(event.type);
}
found.final = (await events.finalResponse()).output[0].content[0].text;

try {
  await client.chat.completions.create({ ...asked, temperature: 3 });
} catch (error) {
  found.error = { name: error.constructor.name, status: error.status, param: error.param };
}
try {
  await client.chat.completions.create({ ...asked, model: "nothing" });
} catch (error) {
  found.unknown = error.constructor.name;
}
console.log(JSON.stringify(found));
