// Text of a model into elements that are safe to show: markdown-it, then DOMPurify, then code colours and formulas.
// Raw HTML in the text stays text, pictures become links: nothing in an answer makes the browser load anything.

import MarkdownIt from "../vendor/markdown-it/markdown-it.esm.min.mjs";
import hljs from "../vendor/highlight/highlight.min.js";
import "../vendor/dompurify/purify.min.js";
import { copyFrom, el, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { addMathRules, renderMath } from "./math.js";

const SAFE_LINK = /^(?:https?|mailto):/i;
const MAX_HIGHLIGHTED = 60_000; // characters; longer code stays in one colour

const md = new MarkdownIt({ html: false, linkify: true, breaks: false, typographer: false });
md.linkify.set({ fuzzyLink: false, fuzzyIP: false, fuzzyEmail: false });
md.validateLink = (url) => SAFE_LINK.test(url.trim());
addMathRules(md);

// A picture would be fetched from wherever the model says, with whatever it wrote into the address.
md.renderer.rules.image = (tokens, at) => {
  const url = tokens[at].attrGet("src");
  const name = tokens[at].content || url;
  return `<a href="${md.utils.escapeHtml(url)}">${md.utils.escapeHtml(name)}</a>`;
};
md.renderer.rules.fence = (tokens, at) => codeBlock(tokens[at].content, tokens[at].info.trim().split(/\s+/)[0]);
md.renderer.rules.code_block = (tokens, at) => codeBlock(tokens[at].content, "");
// markdown-it aligns table cells by a style attribute, which the page forbids.
for (const cell of ["th_open", "td_open"]) {
  md.renderer.rules[cell] = (tokens, at, options, env, self) => {
    const side = /(left|right|center)/.exec(tokens[at].attrGet("style") ?? "")?.[0];
    tokens[at].attrs = side ? [["class", `to-${side}`]] : null;
    return self.renderToken(tokens, at, options);
  };
}

function codeBlock(code, language) {
  const { escapeHtml } = md.utils;
  return `<pre title="${escapeHtml(language.slice(0, 30))}"><code>${escapeHtml(code)}</code></pre>`;
}

const { DOMPurify } = globalThis;
const PROSE = {
  ALLOWED_TAGS: "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre s strong table tbody td th thead tr ul #text"
    .split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "start"],
  ALLOWED_URI_REGEXP: SAFE_LINK,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const COLOURS = { ...PROSE, ALLOWED_TAGS: ["span", "#text"], ALLOWED_ATTR: ["class"] };
DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

// The top-level blocks of a text: [{line, html}], `line` being where a block starts. `open`: more may follow.
export function blocksOf(text, { open = false } = {}) {
  const env = { open };
  const tokens = md.parse(text, env);
  const blocks = [];
  let begin = 0;
  for (let at = 0; at < tokens.length; at++) {
    if (tokens[at].level !== 0 || tokens[at].nesting === 1) continue;
    const own = tokens.slice(begin, at + 1);
    blocks.push({ line: own[0].map?.[0] ?? 0, html: md.renderer.render(own, md.options, env) });
    begin = at + 1;
  }
  return blocks;
}

export function toFragment(html) {
  const fragment = DOMPurify.sanitize(html, PROSE);
  for (const code of fragment.querySelectorAll("pre > code")) framed(code);
  for (const math of fragment.querySelectorAll("code.math-inline, code.math-block")) renderMath(math);
  for (const table of fragment.querySelectorAll("table")) {
    const frame = el("div", { class: "table-frame", tabindex: "0", role: "region", "aria-label": t("table") });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

export function render(text) {
  return toFragment(blocksOf(text).map((block) => block.html).join(""));
}

// Code in a frame with its language and a button that copies it.
function framed(code) {
  const pre = code.parentElement;
  const language = pre.title;
  pre.removeAttribute("title");
  const copy = iconButton("copy", t("copyCode"), () => copyFrom(copy, code.textContent));
  const head = el("figcaption", {}, el("span", {}, language), copy);
  const frame = el("figure", { class: "code" }, head);
  pre.replaceWith(frame);
  pre.setAttribute("tabindex", "0"); // it may scroll sideways, so that the keyboard must reach it
  frame.append(pre);
  colour(code, language);
}

function colour(code, language) {
  if (!language || !hljs.getLanguage(language) || code.textContent.length > MAX_HIGHLIGHTED) return;
  const { value } = hljs.highlight(code.textContent, { language, ignoreIllegals: true });
  code.replaceChildren(DOMPurify.sanitize(value, COLOURS));
}
