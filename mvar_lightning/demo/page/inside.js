// Looking inside: token maps with the picture after each, where a token looks, and the strategy's mask.
const CELLS = 288;  // pixels of a map's canvas

export class Inside {
  constructor(page) {
    this.page = page;
    this.blocks = document.getElementById("block");
    this.blocks.onchange = () => this.draw();
    this.reset();
  }

  reset() {
    const { model, part, element, state } = this.page;
    Object.assign(this, { given: null, tokens: null, attention: null, query: null, masked: "" });
    part("inside", "maps").replaceChildren();
    part("inside", "mask").removeAttribute("src");
    document.getElementById("looked").textContent = "";
    if (!state.models.length) return;
    const names = ["all blocks", ...Array.from({ length: model().blocks }, (_, index) => `block ${index + 1}`)];
    this.blocks.replaceChildren(...names.map((name, index) => element("option", { value: index, textContent: name })));
  }

  open(given) {
    this.given = given;
    return this.show();
  }

  async mask() {
    const { ask, model, part, source } = this.page, { name } = model();
    document.getElementById("strategy").textContent = `${model().attention}; history ${model().history}`;
    if (this.masked === name) return;
    this.masked = name;  // asked for already, though it may wait for another job
    let came = false;
    await ask("mask", { model: name }, (event) => {
      if (event.event !== "mask") return;
      came = true;
      part("inside", "mask").src = source(event.image);
    });
    if (!came) this.masked = "";
  }

  async show() {
    const { ask, model, part, element, source } = this.page;
    if (!this.given) throw new Error("picture: upload one, or take the last sample");
    const figures = [], { image, tokens } = this.given;
    await ask("tokens", { model: model().name, ...(tokens ? { tokens } : { image }) }, (event) => {
      if (event.event === "grown") figures.push(event);
      if (event.event === "tokens") this.tokens = event.tokens;
    });
    if (!this.tokens || figures.length !== model().scales.length) return;
    this.attention = this.query = null;
    document.getElementById("looked").textContent = "";
    part("inside", "maps").replaceChildren(...model().scales.map(([height, width], scale) => {
      const cell = CELLS / Math.max(height, width);
      const canvas = element("canvas", { width: cell * width, height: cell * height, tabIndex: 0 });
      canvas.setAttribute("aria-label", `Tokens of ${height} x ${width}`);
      const token = (event) => [[event.offsetY / canvas.clientHeight, height], [event.offsetX / canvas.clientWidth, width]].map(([at, side]) => Math.min(side - 1, Math.max(0, Math.floor(at * side))));
      canvas.onclick = (event) => this.look(scale, ...token(event));
      canvas.onmousemove = (event) => { const [y, x] = token(event); canvas.title = `row ${y + 1}, column ${x + 1}: code ${this.tokens[this.start(scale) + y * width + x]}`; };
      const { psnr, images } = figures[scale];
      const words = `${height} x ${width}${psnr === null || psnr === undefined ? "" : `, ${psnr.toFixed(1)} dB`}`;
      return element("figure", {}, canvas, element("img", { src: source(images[0]), alt: `Picture after ${height} x ${width}` }), element("figcaption", { textContent: words }));
    }));
    this.draw();
  }

  start(scale) {
    return this.page.model().scales.slice(0, scale).reduce((sum, [height, width]) => sum + height * width, 0);
  }

  async look(scale, y, x) {
    const { ask, model } = this.page, [height, width] = model().scales[scale], query = this.start(scale) + y * width + x;
    if (this.page.state.job) return;
    await ask("attention", { model: model().name, tokens: this.tokens, label: this.given.label ?? "none", query }, (event) => {
      if (event.event !== "attention") return;
      Object.assign(this, { attention: event.blocks, query });
      this.draw();
      document.getElementById("looked").textContent = `The token in row ${y + 1}, column ${x + 1} of ${height} x ${width} looks at what is orange, mean over heads; the deepest orange is its largest share, ${(100 * Math.max(...this.shares())).toFixed(0)}%.`;
    });
  }

  shares() {
    const chosen = Number(this.blocks.value);
    if (chosen) return this.attention[chosen - 1];
    return this.attention[0].map((_, token) => this.attention.reduce((sum, block) => sum + block[token], 0) / this.attention.length);
  }

  // Codes have no order: each gets a hue of its own. A question puts its answer in their place.
  draw() {
    const { model, part } = this.page, shares = this.attention && this.shares(), most = shares && Math.max(...shares);
    if (!this.tokens) return;
    [...part("inside", "maps").querySelectorAll("canvas")].forEach((canvas, scale) => {
      const context = canvas.getContext("2d"), [height, width] = model().scales[scale], cell = CELLS / Math.max(height, width), first = this.start(scale);
      context.clearRect(0, 0, canvas.width, canvas.height);
      for (let token = 0; token < height * width; token += 1) {
        const code = this.tokens[first + token], [x, y] = [(token % width) * cell, Math.floor(token / width) * cell];
        context.fillStyle = shares ? `rgba(224, 142, 43, ${shares[first + token] / most})` : `hsl(${(code * 137.508) % 360} 45% ${48 + (code % 5) * 5}%)`;
        context.fillRect(x, y, cell - 1, cell - 1);
        if (first + token !== this.query) continue;
        Object.assign(context, { strokeStyle: "#1b5c9e", lineWidth: 6 });
        context.strokeRect(x + 3, y + 3, cell - 7, cell - 7);
      }
    });
  }
}
