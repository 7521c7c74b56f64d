// Formulas: where they are in a text ($...$, $$...$$, \(...\), \[...\]), and how KaTeX draws them.

import "../vendor/katex/katex.min.js";

const { katex } = globalThis;
const BLOCKS = [["$$", "$$"], ["\\[", "\\]"]];
const OPTIONS = { trust: false, strict: "ignore", throwOnError: true, maxSize: 20, maxExpand: 500, output: "htmlAndMathml" };

export function addMathRules(md) {
  md.inline.ruler.before("escape", "math_inline", inlineRule);
  md.block.ruler.before("fence", "math_block", blockRule, { alt: ["paragraph", "reference", "blockquote", "list"] });
  const code = (kind) => (tokens, at) =>
    `<code class="${kind}">${md.utils.escapeHtml(tokens[at].content)}</code>`;
  md.renderer.rules.math_inline = code("math-inline");
  md.renderer.rules.math_display = code("math-block");
  md.renderer.rules.math_block = (tokens, at) => `<p>${code("math-block")(tokens, at)}</p>\n`;
  // More of it will come: its source, as it stands.
  md.renderer.rules.math_open = (tokens, at) => `<p><code>${md.utils.escapeHtml(tokens[at].content)}</code></p>\n`;
}

function inlineRule(state, silent) {
  const { src, pos, posMax } = state;
  const found = span(src, pos, posMax);
  if (!found) return false;
  if (!silent) state.push(found.display ? "math_display" : "math_inline", "code", 0).content = found.tex;
  state.pos = found.end;
  return true;
}

function span(src, pos, max) {
  if (src.startsWith("\\(", pos)) return between(src, pos, max, "\\)", false);
  if (src.startsWith("\\[", pos)) return between(src, pos, max, "\\]", true);
  if (src.startsWith("$$", pos)) return between(src, pos, max, "$$", true);
  // As in pandoc, so that prices stay prices: no blank inside the signs, no digit after them.
  if (src[pos] !== "$" || /\s/.test(src[pos + 1] ?? " ")) return null;
  for (let end = pos + 1; end < max; end++) {
    if (src[end] === "\\") end++;
    else if (src[end] === "\n" && src[end + 1] === "\n") return null;
    else if (src[end] === "$") {
      if (/\s/.test(src[end - 1]) || /\d/.test(src[end + 1] ?? "")) return null;
      return end === pos + 1 ? null : { tex: src.slice(pos + 1, end), end: end + 1, display: false };
    }
  }
  return null;
}

function between(src, pos, max, close, display) {
  const end = src.indexOf(close, pos + 2);
  if (end < 0 || end + 2 > max || !src.slice(pos + 2, end).trim()) return null;
  return { tex: src.slice(pos + 2, end), end: end + 2, display };
}

// A formula on lines of its own. No blank line inside, as in TeX; while more may come, an open one waits as its source.
function blockRule(state, startLine, endLine, silent) {
  const begin = state.bMarks[startLine] + state.tShift[startLine];
  if (state.sCount[startLine] - state.blkIndent >= 4) return false;
  const pair = BLOCKS.find(([open]) => state.src.startsWith(open, begin));
  if (!pair) return false;
  for (let line = startLine; line < endLine; line++) {
    if (state.isEmpty(line)) return false;
    const from = line === startLine ? begin + 2 : state.bMarks[line];
    const text = state.src.slice(from, state.eMarks[line]);
    const at = text.indexOf(pair[1]);
    if (at < 0) continue;
    if (text.slice(at + 2).trim()) return false; // more on the line: the inline rule's
    const tex = state.getLines(startLine, line + 1, state.blkIndent, false).trim().slice(2, -2);
    if (!silent) push(state, "math_block", tex, startLine, line + 1);
    return true;
  }
  if (!state.env.open) return false;
  if (!silent) push(state, "math_open", state.getLines(startLine, endLine, state.blkIndent, false), startLine, endLine);
  return true;
}

function push(state, kind, content, line, next) {
  const token = state.push(kind, "code", 0);
  token.block = true;
  token.content = content;
  token.map = [line, next];
  state.line = next;
}

// Replaces the source by the drawing; what KaTeX does not understand stays source.
export function renderMath(code) {
  const displayMode = code.classList.contains("math-block");
  try {
    const tree = katex.__renderToDomTree(code.textContent, { ...OPTIONS, displayMode });
    styleByObject(tree);
    const drawing = tree.toNode();
    if (displayMode) drawing.tabIndex = 0; // it may scroll sideways
    code.replaceWith(drawing);
  } catch {
    code.className = "math-source";
  }
}

// KaTeX sets most styles through element.style, which the page's policy allows, and a few as style attributes, which
// it does not. The tree is walked before the elements are made, and these few go the same way.
function styleByObject(node) {
  const style = node.attributes?.style;
  if (style) {
    delete node.attributes.style;
    const make = node.toNode.bind(node);
    node.toNode = () => {
      const element = make();
      element.style.cssText += style;
      return element;
    };
  }
  for (const child of node.children ?? []) styleByObject(child);
}
