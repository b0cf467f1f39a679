// The side panel: the passage behind a citation, its quote highlighted. In: a citation with the passages shown to the
// model. Out: the panel opened, focus in it, and given back to the opener when it closes.

import { byId, cut, el, icon, webAddress } from "./dom.js";
import { t } from "./strings.js";

const NARROW = matchMedia("(max-width: 60rem)");

export class Panel {
  constructor() {
    this.node = byId("panel");
    this.opener = null;
    const close = byId("panel-close");
    close.append(icon("close"));
    close.addEventListener("click", () => this.close());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !this.node.hidden && !byId("key-dialog").open) this.close();
    });
    NARROW.addEventListener("change", () => this.cover());
  }

  /** Shows the passage that a citation quotes, or says that no passage holds it. */
  openCitation(citation, hits, opener) {
    const hit = citation.verified ? passageOf(citation, hits) : null;
    if (!hit) return this.open(citation.title || t("unverified_quote"), missing(citation), opener);
    const [before, quoted, after] = cut(hit.text, citation.start - hit.start, citation.end - hit.start);
    const text = el("blockquote", { class: "passage" }, before, el("mark", { text: quoted }), after);
    const verdict = el("p", { class: "verdict", text: t("verified") });
    return this.open(hit.title, [...about(hit, citation), verdict, text], opener);
  }

  /** Shows a passage that the model was shown. */
  openPassage(hit, opener) {
    this.open(hit.title, [...about(hit, hit), el("blockquote", { class: "passage", text: hit.text })], opener);
  }

  open(title, content, opener) {
    this.opener?.removeAttribute("aria-expanded");
    this.opener = opener;
    opener.setAttribute("aria-expanded", "true");
    byId("panel-title").textContent = title;
    byId("panel-body").replaceChildren(...content);
    this.node.hidden = false;
    byId("room").classList.add("with-panel");
    this.cover();
    byId("panel-title").focus({ preventScroll: true });
    byId("panel-body").scrollTop = 0;
    this.node.querySelector("mark")?.scrollIntoView({ block: "nearest" });
  }

  close() {
    if (this.node.hidden) return;
    this.node.hidden = true;
    byId("room").classList.remove("with-panel");
    this.cover();
    this.opener?.removeAttribute("aria-expanded");
    if (this.opener?.isConnected) this.opener.focus();
    else byId("question").focus();
    this.opener = null;
  }

  /** On a narrow screen the panel covers the page, which then must not take the focus. */
  cover() {
    const covered = NARROW.matches && !this.node.hidden;
    for (const node of [document.querySelector(".top"), byId("talk")]) node.inert = covered;
  }
}

function passageOf(citation, hits) {
  const holds = (hit) => hit && hit.doc_id === citation.doc_id && hit.start <= citation.start && citation.end <= hit.end;
  const named = hits[citation.passage - 1];
  return holds(named) ? named : hits.find(holds) ?? null;
}

function about(hit, { start, end }) {
  const address = webAddress(hit.uri);
  const facts = el("dl", { class: "facts" });
  const fact = (name, value) => facts.append(el("dt", { text: t(name) }), el("dd", {}, value));
  if (hit.heading) fact("section", hit.heading);
  if (address) fact("address", el("a", { href: address, target: "_blank", rel: "noopener noreferrer", text: hit.uri }));
  else if (hit.uri) fact("address", hit.uri);
  fact("document", hit.doc_id);
  const score = Number(hit.score).toFixed(3);
  return [facts, el("p", { class: "place", text: `${t("where", { start, end })} · ${t("rank", { rank: hit.rank, score })}` })];
}

function missing(citation) {
  return [
    el("p", { class: "verdict bad", text: t("not_found") }),
    el("blockquote", { class: "passage unfound", text: citation.quote }),
  ];
}
