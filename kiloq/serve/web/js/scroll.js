// The transcript stays at its end while it grows, if the reader is there, and never moves otherwise.

const NEAR = 48; // pixels from the end that still count as the end

export class StickyScroll {
  #stuck = true;
  #last = 0;

  constructor(scroller, content, button) {
    this.scroller = scroller;
    this.button = button;
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    const watch = new ResizeObserver(() => this.#grown());
    watch.observe(content);
    watch.observe(scroller);
    button.addEventListener("click", () => this.toEnd());
  }

  toEnd() {
    this.#stuck = true;
    this.#grown();
  }

  #distance() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight;
  }

  // Only a move upwards lets go: growth alone also makes the end farther away.
  #scrolled() {
    const { scrollTop } = this.scroller;
    const near = this.#distance() < NEAR;
    if (near) this.#stuck = true;
    else if (scrollTop < this.#last) this.#stuck = false;
    this.#last = scrollTop;
    this.button.hidden = near || this.#stuck;
  }

  #grown() {
    if (this.#stuck) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#last = this.scroller.scrollTop;
    this.button.hidden = this.#stuck || this.#distance() < NEAR;
  }
}
