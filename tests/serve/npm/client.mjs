// Drives a server with OpenAI's own JavaScript client and prints what came of it as one JSON object, for
// tests/serve/test_clients.py to judge. Usage: node client.mjs BASE_URL
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "Qwen";
const user = (content) => [{ role: "user", content }];
const says = (text) => ({ temperature: 0, guided_choice: [text] });
const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>';
const chatTool = { type: "function", function: { name: "get_weather", description: "Weather", parameters } };
const responseTool = { type: "function", name: "get_weather", description: "Weather", parameters, strict: true };

const scenarios = {
  async models() {
    const ids = [];
    for await (const one of client.models.list()) ids.push(one.id);
    return { ids, retrieved: (await client.models.retrieve(ids[0])).id };
  },

  async chat() {
    return client.chat.completions.create({ model, messages: user("Hello"), ...says("Hello, world") });
  },

  async chat_stream() {
    const request = { model, messages: user("Hello"), stream: true, stream_options: { include_usage: true } };
    let text = "";
    let usage = null;
    for await (const chunk of await client.chat.completions.create({ ...request, ...says("Hello, world") })) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    return { text, usage };
  },

  async chat_tools() {
    const request = { model, messages: user("Weather in Paris?"), tools: [chatTool], ...says(call) };
    const whole = await client.chat.completions.create(request);
    const streamed = await client.chat.completions.stream(request).finalChatCompletion();
    return { whole: whole.choices[0], streamed: streamed.choices[0] };
  },

  async completion() {
    return client.completions.create({ model, prompt: ["a", "b"], max_tokens: 4, ...says("one two") });
  },

  async response() {
    return client.responses.create({ model, input: "Hello", ...says("Hello, world") });
  },

  async response_stream() {
    const request = { model, input: "Weather?", tools: [responseTool], ...says(call) };
    const stream = client.responses.stream(request);
    const types = [];
    for await (const event of stream) types.push(event.type);
    return { types, output: (await stream.finalResponse()).output };
  },

  async embeddings() {
    const input = ["a cat", "a dog"];
    const asked = await client.embeddings.create({ model, input });
    const floats = await client.embeddings.create({ model, input, encoding_format: "float" });
    return { asked: asked.data.map((one) => one.embedding), floats: floats.data.map((one) => one.embedding) };
  },

  async error() {
    try {
      await client.chat.completions.create({ model: "no-such-model", messages: user("Hello") });
      return null;
    } catch (error) {
      return { name: error.constructor.name, status: error.status, code: error.code, message: error.message };
    }
  },
};

const told = {};
for (const [name, run] of Object.entries(scenarios)) told[name] = await run();
console.log(JSON.stringify(told));
