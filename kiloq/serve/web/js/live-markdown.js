// Markdown that grows. Finished blocks are made once and stay; only the last block is made again, at most once a frame
// and for at most a fifth of the time, so that the cost of an answer grows with its length and not with its square.

import { blocksOf, toFragment } from "./markdown.js";

const DEFINITION = /^[ >*+\d.-]*\[[^\]]+\]:/m;
const SHARE = 4; // pauses between renderings, in units of the last one's duration

export class LiveMarkdown {
  #text = "";
  #done = 0; // characters of finished blocks
  #tail = []; // the nodes of the last block
  #frame = 0;
  #resting = 0;

  constructor(element) {
    this.element = element;
  }

  // The whole text so far.
  update(text) {
    this.#text = text;
    if (!this.#frame && !this.#resting) this.#frame = requestAnimationFrame(() => this.#render());
  }

  finish(text) {
    cancelAnimationFrame(this.#frame);
    clearTimeout(this.#resting);
    this.#text = text;
    // Links by reference find their addresses only when all is there: then all is made once more.
    if (this.#done && DEFINITION.test(text)) {
      this.#done = 0;
      this.#tail = [...this.element.childNodes];
    }
    this.#show(false);
  }

  #render() {
    this.#frame = 0;
    const begin = performance.now();
    const shown = this.#text;
    this.#show(true);
    this.#resting = setTimeout(() => {
      this.#resting = 0;
      if (this.#text !== shown) this.update(this.#text);
    }, SHARE * (performance.now() - begin));
  }

  #show(open) {
    const text = this.#text.slice(this.#done).replace(/\r\n?/g, "\n");
    const blocks = blocksOf(text, { open });
    const last = finishedUpTo(blocks, text, open);
    if (last > 0) {
      const html = blocks.slice(0, last).map((block) => block.html);
      this.#replaceTail(toFragment(html.join("")));
      this.#tail = [];
      this.#done += lengthOfLines(this.#text.slice(this.#done), blocks[last]?.line);
    }
    this.#replaceTail(toFragment(blocks.slice(last).map((block) => block.html).join("")));
  }

  #replaceTail(fragment) {
    if (this.#grown(fragment)) return;
    const nodes = [...fragment.childNodes];
    for (const node of this.#tail) node.remove();
    this.element.append(fragment);
    this.#tail = nodes;
  }

  // Code that grew keeps its frame, its scroll position and a focused button.
  #grown(fragment) {
    const [before] = this.#tail;
    const [after] = fragment.childNodes;
    const alone = this.#tail.length === 1 && fragment.childNodes.length === 1;
    if (!alone || !before.matches?.("figure.code") || !after.matches?.("figure.code")) return false;
    if (before.querySelector("figcaption").textContent !== after.querySelector("figcaption").textContent) return false;
    before.querySelector("code").replaceChildren(...after.querySelector("code").childNodes);
    return true;
  }
}

// How many blocks can no longer change: those that a block follows whose first line is whole. ("2" may become "2.",
// and go on with the list above it.)
function finishedUpTo(blocks, text, open) {
  if (!open) return 0;
  const lines = text.split("\n").length;
  let last = blocks.length - 1;
  while (last > 0 && blocks[last].line >= lines - 1) last--;
  return Math.max(last, 0);
}

function lengthOfLines(text, lines) {
  const ends = /\r\n?|\n/g;
  for (let line = 0; line < lines; line++) ends.exec(text);
  return ends.lastIndex;
}
