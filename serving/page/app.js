// The chat page: wires the composer, the pickers and the conversation. No framework, no build step, no other host.

import { AnswerCard, sentence } from "./answer.js";
import { key, models } from "./api.js";
import { byId, el } from "./dom.js";
import { Panel } from "./panel.js";
import { has, t, translate } from "./strings.js";

const MOST_COMPARED = 5;
const turns = []; // {question, cards: Map from strategy to AnswerCard}
let offered = []; // {id, name}

translate(document);
const panel = new Panel();
const page = { panel, say, needKey, grown: follow, rerun: (card) => finish([card]) };

function say(text) {
  byId("status").textContent = text;
}

// ---- What is asked ------------------------------------------------------------------------------------------------

const comparing = () => document.querySelector("input[name=mode]:checked").value === "compare";

function chosenModels() {
  if (!comparing()) return offered.filter((model) => model.id === byId("strategy").value);
  const ticked = new Set([...byId("choices").querySelectorAll("input:checked")].map((box) => box.value));
  return offered.filter((model) => ticked.has(model.id));
}

/** The conversation so far, as `strategy` has it: its own answers, or another's where it was not asked. */
function messagesFor(strategy, question) {
  const messages = [];
  for (const turn of turns) {
    const card = turn.cards.get(strategy);
    const said = card?.said || [...turn.cards.values()].map((other) => other.said).find(Boolean);
    if (!said) continue;
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content: said });
  }
  return [...messages, { role: "user", content: question }];
}

async function submit() {
  const question = byId("question").value.trim();
  if (!question || running().length) return;
  if (!offered.length) await load();
  const asked = chosenModels();
  if (!asked.length) return say(offered.length ? t("choose_one") : t("no_models"));
  const cards = asked.map((model) => new AnswerCard(model, messagesFor(model.name, question), page));
  turns.push({ question, cards: new Map(cards.map((card) => [card.model.name, card])) });
  byId("welcome").hidden = true;
  byId("question").value = "";
  grow();
  byId("conversation").append(el("section", { class: "turn" },
    el("div", { class: "asked" }, el("h2", { class: "unseen", text: t("you") }), el("p", { text: question })),
    el("div", { class: cards.length > 1 ? "answers side" : "answers" }, ...cards.map((card) => card.node))));
  byId("main").classList.toggle("wide", turns.some((turn) => turn.cards.size > 1));
  following = true;
  await finish(cards);
}

async function finish(cards) {
  say(t("waiting"));
  const work = cards.map((card) => card.run());
  showRunning();
  await Promise.all(work.map((one) => one.finally(showRunning)));
  say("");
}

const running = () => turns.flatMap((turn) => [...turn.cards.values()]).filter((card) => card.running);

function showRunning() {
  const busy = running();
  const stopHadFocus = document.activeElement === byId("stop");
  byId("send").hidden = busy.length > 0;
  byId("stop").hidden = busy.length === 0;
  if (!busy.length && stopHadFocus) byId("question").focus();
  const release = turns.flatMap((turn) => [...turn.cards.values()]).findLast((card) => card.result)?.result.details.release;
  byId("release").hidden = !release;
  byId("release").textContent = release ? release.replace(/^release\//, "").replace(/\/(.{8}).*$/, " $1") : "";
  byId("release").title = release ?? "";
}

function stopAll() {
  for (const card of running()) card.stop();
}

function fresh() {
  stopAll();
  panel.close();
  turns.length = 0;
  byId("conversation").replaceChildren();
  byId("welcome").hidden = false;
  byId("main").classList.remove("wide");
  showRunning();
  byId("question").focus();
}

// ---- Pickers --------------------------------------------------------------------------------------------------------

async function load() {
  const startup = byId("startup");
  try {
    offered = await models();
  } catch (error) {
    if (error.kind === "key") return needKey(error);
    startup.textContent = sentence(error);
    startup.hidden = false;
    return;
  }
  startup.hidden = offered.length > 0;
  if (!offered.length) startup.textContent = t("no_models");
  const label = (name) => (has(`about_${name}`) ? `${name}: ${t(`about_${name}`)}` : name);
  byId("strategy").replaceChildren(...offered.map((model) => el("option", { value: model.id, text: label(model.name) })));
  byId("strategy").disabled = offered.length === 0;
  const auto = offered.find((model) => model.name === "auto");
  if (auto) byId("strategy").value = auto.id;
  const liked = ["base", "rag", "finetuned", "raft", "hybrid", "finetuned_rag"];
  const first = liked.filter((name) => offered.some((model) => model.name === name)).slice(0, MOST_COMPARED);
  byId("choices").replaceChildren(...offered.map((model) => el("label", { title: label(model.name) },
    el("input", { type: "checkbox", value: model.id, checked: first.includes(model.name) }),
    el("span", { text: model.name }))));
  limitChoices();
}

function limitChoices() {
  say("");
  const boxes = [...byId("choices").querySelectorAll("input")];
  const full = boxes.filter((box) => box.checked).length >= MOST_COMPARED;
  for (const box of boxes) box.disabled = full && !box.checked;
}

function showMode() {
  byId("picker").hidden = comparing();
  byId("chosen").hidden = !comparing();
}

// ---- API key --------------------------------------------------------------------------------------------------------

function needKey(failure) {
  byId("enter-key").hidden = false;
  byId("key-reason").textContent = `${t(key.get() ? "key_refused" : "key_needed")} ${failure ? t("key_text") : ""}`;
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

async function saveKey(event) {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key").value = "";
  byId("key-dialog").close();
  byId("question").focus();
  await load();
}

// ---- Typing and scrolling -----------------------------------------------------------------------------------------------

function grow() {
  const box = byId("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, innerHeight * 0.35)}px`;
}

let following = true; // until the reader scrolls

/** Keeps the newest words in sight until the question reaches the top, unless the reader has scrolled away. */
function follow() {
  const main = byId("main");
  const turn = byId("conversation").lastElementChild;
  if (!following || !turn) return;
  const question = main.scrollTop + turn.getBoundingClientRect().top - main.getBoundingClientRect().top;
  const end = main.scrollHeight - main.clientHeight;
  main.scrollTop = Math.min(end, turns.length > 1 ? question : 0);
}

for (const gesture of ["wheel", "touchmove"]) {
  byId("main").addEventListener(gesture, () => { following = false; }, { passive: true });
}
byId("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
byId("question").addEventListener("input", grow);
byId("question").addEventListener("keydown", (event) => {
  // An input method takes Enter to choose a word (229 where it does not say that it is composing).
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  submit();
});
byId("stop").addEventListener("click", stopAll);
byId("fresh").addEventListener("click", fresh);
byId("enter-key").addEventListener("click", () => needKey());
byId("key-form").addEventListener("submit", saveKey);
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("choices").addEventListener("change", limitChoices);
for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", showMode);
showMode();
load();
