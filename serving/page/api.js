// Talks to the server: models, streamed answers, feedback. In: questions. Out: text as it arrives, then the details.
// Every failure is a `Failure` with a kind that the page can put into words; a stream without [DONE] is one.

const KEY = "rayft-api-key";

/** What went wrong: `kind` is network, key, busy, refused, failed, unanswered,
 * incomplete, broken or stopped. */
export class Failure extends Error {
  constructor(kind, { status = 0, message = "", retryAfter = 0 } = {}) {
    super(message || kind);
    Object.assign(this, { kind, status, reason: message, retryAfter });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

function headers() {
  const sent = { "Content-Type": "application/json" };
  if (key.get()) sent.Authorization = `Bearer ${key.get()}`;
  return sent;
}

/** One request; anything but success is raised. Addresses are relative: the server may live under a prefix. */
async function request(path, { body, signal } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET", headers: headers(), body: body && JSON.stringify(body), signal,
    });
  } catch (error) {
    throw new Failure(error.name === "AbortError" ? "stopped" : "network");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  const content = await response.json().catch(() => ({}));
  const message = content?.error?.message ?? response.statusText;
  const retryAfter = Number.parseInt(response.headers.get("Retry-After") ?? "", 10) || 0;
  if (status === 401) return new Failure("key", { status, message });
  if (status === 429) return new Failure("busy", { status, message, retryAfter });
  return new Failure(status < 500 ? "refused" : "failed", { status, message, retryAfter });
}

const NO_STRATEGY = new Set(["rayft-embedding"]);

/** Names of the strategies that the server offers, with the model ids that ask for them. */
export async function models() {
  const { data } = await (await request("v1/models")).json();
  return data.filter((model) => model.id.startsWith("rayft-") && !NO_STRATEGY.has(model.id))
    .map((model) => ({ id: model.id, name: model.id.slice("rayft-".length) }));
}

/** Sends what a person thinks of an answer. */
export async function sendFeedback(rating) {
  await request("v1/feedback", { body: rating });
}

/**
 * Asks, and hands on text as it arrives.
 * @returns {{requestId, text, annotations, finishReason, details, usage}} once the server said [DONE].
 */
export async function ask(model, messages, { signal, onText }) {
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { body, signal });
  const answer = { requestId: "", text: "", annotations: [], finishReason: null, details: null, usage: null };
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        if (!answer.details) throw new Failure("incomplete");
        return answer;
      }
      take(JSON.parse(data), answer, onText);
    }
  } catch (error) {
    if (error instanceof Failure) throw error;
    throw new Failure(error.name === "AbortError" ? "stopped" : "incomplete");
  }
  throw new Failure("incomplete");
}

function take(event, answer, onText) {
  if (event.error) throw new Failure(answer.text ? "broken" : "unanswered", { message: event.error.message });
  answer.requestId = event.id ?? answer.requestId;
  answer.usage = event.usage ?? answer.usage;
  answer.details = event.rayft ?? answer.details;
  const choice = event.choices?.[0];
  if (!choice) return;
  answer.finishReason = choice.finish_reason ?? answer.finishReason;
  answer.annotations.push(...(choice.delta?.annotations ?? []));
  if (choice.delta?.content) {
    answer.text += choice.delta.content;
    onText(answer.text);
  }
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (waiting + value).split(/\r?\n\r?\n/);
      waiting = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
