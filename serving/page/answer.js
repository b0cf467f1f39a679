// One answer: its stream, and when it is done its citations, route, times, rating. In: a strategy and the messages.
// Out: an article that keeps itself up to date. Text is only ever set as text (see dom.js).

import { Failure, ask, sendFeedback } from "./api.js";
import { cut, el, icon } from "./dom.js";
import { duration, t } from "./strings.js";

let made = 0;

export class AnswerCard {
  /**
   * @param {{id, name}} model what is asked
   * @param {object[]} messages the conversation, the question last
   * @param {{panel, say, needKey, grown}} page what a card asks of the page
   */
  constructor(model, messages, page) {
    Object.assign(this, { model, messages, page, result: null, partial: "", running: false });
    const id = `answer-${++made}`;
    this.clock = el("span", { class: "clock" });
    this.name = el("h3", { id, text: model.name, "aria-label": t("answered_by", { strategy: model.name }) });
    this.standalone = el("p", { class: "standalone", hidden: true });
    this.text = el("div", { class: "text" });
    this.rest = el("div", { class: "rest" });
    this.node = el("article", { class: "answer", "aria-labelledby": id },
      el("header", {}, this.name, this.clock), this.standalone, this.text, this.rest);
  }

  /** Asks; returns when the answer is done, stopped or failed. */
  async run() {
    this.running = true;
    this.partial = "";
    this.abort = new AbortController();
    this.text.replaceChildren();
    this.rest.replaceChildren();
    this.node.className = "answer busy";
    this.node.setAttribute("aria-busy", "true");
    const began = performance.now();
    let firstMs = null;
    const tick = () => { this.clock.textContent = duration(performance.now() - began); };
    const timer = setInterval(tick, 500);
    const onText = (text) => {
      firstMs ??= performance.now() - began;
      this.partial = text;
      this.text.textContent = text;
      this.page.grown();
    };
    try {
      this.result = await ask(this.model.id, this.messages, { signal: this.abort.signal, onText });
      this.node.className = "answer done";
      this.show(firstMs, performance.now() - began);
    } catch (error) {
      this.node.className = "answer failed";
      this.fail(error instanceof Failure ? error : new Failure("failed", { message: String(error) }));
    } finally {
      clearInterval(timer);
      this.running = false;
      this.node.setAttribute("aria-busy", "false");
      this.page.grown();
    }
  }

  stop() {
    this.abort?.abort();
  }

  /** What a later turn tells the model that this answer was; nothing where there was none. */
  get said() {
    return this.result?.details.answer || this.partial;
  }

  show(firstMs, totalMs) {
    const { details, text, annotations } = this.result;
    const asked = this.model.name;
    this.name.textContent = asked === details.strategy ? asked : `${asked} → ${details.strategy}`;
    this.clock.textContent = duration(details.timings_ms.total || totalMs);
    if (details.standalone) {
      this.standalone.hidden = false;
      this.standalone.textContent = t("standalone", { question: details.standalone });
    }
    const cited = numbered(details.citations);
    const suffix = this.showText(text, annotations, details, cited);
    const invented = distinct(details.citations.filter((citation) => !citation.verified));
    this.rest.replaceChildren(...[
      details.abstained && note("abstained", t("abstained")),
      this.result.finishReason === "length" && note("warn", t("cut")),
      !details.abstained && suffix && !invented.length && note("plain", suffix),
      cited.length && this.list(cited, t("sources"), "sources"),
      invented.length && this.list(invented, t("unverified"), "sources invented"),
      routed(details.route),
      timeline(details.timings_ms),
      this.how(details, firstMs),
      this.actions(),
    ].filter(Boolean));
  }

  /** The answer with its markers as buttons; returns what the server says about a missing source. */
  showText(text, annotations, details, cited) {
    const marks = annotations.map((a) => a.url_citation).filter((c) => c && cited.length);
    if (!marks.length) {
      const own = details.answer && text.endsWith(details.answer) ? text : details.answer;
      this.text.textContent = own || text;
      const after = text.startsWith(details.answer) ? text.slice(details.answer.length).trim() : "";
      return /^[（(].+[)）]$/.test(after) ? after.slice(1, -1) : "";
    }
    const bounds = marks.flatMap((mark) => [mark.start_index, mark.end_index]);
    const parts = cut(text, ...bounds);
    const nodes = parts.map((part, i) => (i % 2 ? this.marker(part, cited, details.hits) : part));
    // The list of sources that follows the last marker stands below, as buttons.
    nodes.push(nodes.pop().replace(/\n\n[^\n]*[:：]\n\[1\] [\s\S]*$/, ""));
    this.text.replaceChildren(...nodes);
    return "";
  }

  marker(text, cited, hits) {
    const number = Number.parseInt(text.replace(/\D/g, ""), 10);
    const citation = cited.find((one) => one.number === number);
    if (!citation) return text;
    const label = t("source", { n: number, title: citation.title });
    return el("button", {
      type: "button", class: "cite", text: String(number), title: citation.title, "aria-label": label,
      onclick: (event) => this.page.panel.openCitation(citation, hits, event.currentTarget),
    });
  }

  list(citations, title, kind) {
    const { hits } = this.result.details;
    const items = citations.map((citation) => el("li", {}, el("button", {
      type: "button", class: "source",
      onclick: (event) => this.page.panel.openCitation(citation, hits, event.currentTarget),
    },
    el("span", { class: "number", "aria-hidden": "true", text: citation.number ? String(citation.number) : "?" }),
    el("span", {}, el("b", { text: citation.verified ? citation.title : t("unverified_quote") }), " ",
      el("q", { text: oneLine(citation.quote) })))));
    return el("section", { class: kind }, el("h4", { text: title }), el("ol", {}, ...items));
  }

  how(details, firstMs) {
    const { route, hits } = details;
    const facts = el("dl", { class: "facts" });
    const fact = (name, value) => value !== "" && facts.append(el("dt", { text: t(name) }), el("dd", { text: value }));
    if (this.model.name === "auto") fact("intent", route.intent || t("unknown"));
    if (route.intent) fact("confidence", percent(route.confidence));
    if (route.propensity !== undefined && route.propensity < 1) fact("propensity", percent(route.propensity));
    fact("experiment", route.experiment ?? "");
    const { usage } = this.result;
    if (usage) fact("tokens", t("tokens_value", { prompt: usage.prompt_tokens, completion: usage.completion_tokens }));
    if (firstMs !== null) fact("first_words", duration(firstMs));
    fact("release", details.release);
    return el("details", { class: "how" }, el("summary", { text: t("how") }), facts,
      details.reasoning ? el("div", { class: "reasoning" }, el("h4", { text: t("reasoning") }), el("p", { text: details.reasoning })) : "",
      hits.length ? this.shown(hits, details.passages_left_out) : "");
  }

  shown(hits, leftOut) {
    const items = hits.map((hit) => el("li", {}, el("button", {
      type: "button", class: "link", text: [hit.title, hit.heading].filter(Boolean).join(" · "),
      onclick: (event) => this.page.panel.openPassage(hit, event.currentTarget),
    })));
    return el("div", { class: "shown" }, el("h4", { text: t("passages") }), el("ol", {}, ...items),
      leftOut ? el("p", { class: "small", text: t("left_out", { n: leftOut }) }) : "");
  }

  actions() {
    const requestId = this.result.requestId;
    const told = el("span", { class: "told", role: "status" });
    let stored = {}; // a later rating replaces an earlier one: what was said before is said again
    const send = async (rating) => {
      try {
        await sendFeedback({ request_id: requestId, ...stored, ...rating });
        stored = { ...stored, ...rating };
        told.textContent = t("thanks");
        return true;
      } catch (error) {
        if (error.kind === "key") this.page.needKey(error);
        told.textContent = t("feedback_failed", { message: sentence(error) });
        return false;
      }
    };
    const thumbs = ["up", "down"].map((way) => button(way, t(way === "up" ? "good" : "bad"), async () => {
      if (!(await send({ rating: way }))) return;
      for (const other of thumbs) other.setAttribute("aria-pressed", String(other.dataset.way === way));
      if (way === "down") open(true);
    }));
    thumbs.forEach((node, i) => { node.dataset.way = ["up", "down"][i]; node.setAttribute("aria-pressed", "false"); });
    const copy = button("copy", t("copy"), async () => {
      try {
        await navigator.clipboard.writeText(this.result.text);
        told.textContent = t("copied");
      } catch {
        told.textContent = t("copy_failed");
      }
    });
    const box = correctionBox(async (correction) => {
      if (await send({ rating: stored.rating ?? "down", correction })) open(false);
    });
    const edit = button("edit", t("correct"), () => open(box.hidden));
    const open = (shown) => {
      box.hidden = !shown;
      edit.setAttribute("aria-expanded", String(shown));
      if (shown) box.querySelector("textarea").focus();
      else edit.focus();
    };
    edit.setAttribute("aria-expanded", "false");
    return el("div", { class: "actions" }, el("div", { class: "buttons" }, ...thumbs, edit, copy, told), box);
  }

  fail(failure) {
    if (failure.kind === "key") this.page.needKey(failure);
    const problem = note(failure.kind === "stopped" ? "plain" : "problem", sentence(failure));
    this.rest.replaceChildren(problem);
    const again = el("button", { type: "button", class: "quiet again", text: t("retry"), onclick: () => this.page.rerun(this) });
    this.rest.append(again);
    if (failure.retryAfter) countDown(again, failure.retryAfter);
  }
}

/** What went wrong, in words. */
export function sentence({ kind, status, reason }) {
  const message = reason || t("unknown_error");
  if (kind === "key") return t("key_needed");
  return t(kind, { status, message });
}

function note(kind, text) {
  return el("p", { class: `note ${kind}`, role: kind === "problem" ? "alert" : null, text });
}

function button(name, label, onclick) {
  return el("button", { type: "button", class: "icon", title: label, "aria-label": label, onclick }, icon(name));
}

function countDown(again, seconds) {
  again.disabled = true;
  again.textContent = t("retry_in", { n: seconds });
  if (seconds > 0) setTimeout(() => countDown(again, seconds - 1), 1000);
  else Object.assign(again, { disabled: false, textContent: t("retry") });
}

function correctionBox(onSend) {
  const area = el("textarea", { rows: "3", "aria-label": t("correction"), placeholder: t("correction") });
  const form = el("form", { class: "correction", hidden: true }, area,
    el("button", { type: "submit", class: "quiet", text: t("send_correction") }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (area.value.trim()) onSend(area.value.trim());
  });
  return form;
}

/** How the strategy was chosen. */
function routed(route) {
  const intent = route.intent ? ` · ${t("intent_value", { intent: route.intent, confidence: percent(route.confidence) })}` : "";
  return el("p", { class: "route" }, el("b", { text: `${t("route")} ` }), (route.reason || t("asked_for")) + intent);
}

/** The hops as shares of the whole; one that was not taken is left out. */
function timeline(times) {
  const hops = ["retrieval", "queue", "generation"].map((name) => ({ name, ms: times[name] || 0 }))
    .filter(({ ms }) => ms > 0);
  const bar = el("div", { class: "bar", "aria-hidden": "true" });
  const words = el("ul", { class: "hops" });
  for (const { name, ms } of hops) {
    const part = el("span", { class: name });
    part.style.flexGrow = String(ms);
    bar.append(part);
    words.append(el("li", { class: name }, `${t(name)} `, el("b", { text: duration(ms) })));
  }
  words.append(el("li", {}, `${t("total")} `, el("b", { text: duration(times.total || 0) })));
  return el("div", { class: "times" }, bar, words);
}

/** One citation per marker, in the order of their numbers. */
function numbered(citations) {
  const marked = citations.filter((citation) => citation.number);
  return [...new Map(marked.map((citation) => [citation.number, citation])).values()].sort((a, b) => a.number - b.number);
}

/** Citations without repeats. */
function distinct(citations) {
  return [...new Map(citations.map((citation) => [JSON.stringify(citation), citation])).values()];
}

const oneLine = (text) => text.split(/\s+/).join(" ").trim();
const percent = (share) => `${Math.round(share * 100)} %`;
