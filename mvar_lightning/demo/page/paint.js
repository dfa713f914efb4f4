// A picture under a mask that is drawn by pointer. The picture is given away as it came (a canvas would make RGBA of
// gray, and other colors of what is transparent); the mask is kept at the canvas' size and given away at the picture's.
const SIDE = 320;
const TINT = "rgba(224, 56, 41, 0.6)";

export class Painter {
  constructor(canvas, brush) {
    this.canvas = canvas;
    this.brush = brush;
    this.drawn = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
    this.image = null;
    canvas.onpointerdown = (event) => {
      if (!this.image) return;
      canvas.setPointerCapture(event.pointerId);
      this.last = null;
      this.stroke(event);
    };
    canvas.onpointermove = (event) => event.buttons && this.image && this.stroke(event);
  }

  // png: in base64
  async open(png, size) {
    const image = new Image();
    image.src = `data:image/png;base64,${png}`;
    await image.decode();
    Object.assign(this, { image, png, size });
    const [height, width] = size, scale = SIDE / Math.max(height, width);
    for (const each of [this.canvas, this.drawn]) Object.assign(each, { height: Math.round(height * scale), width: Math.round(width * scale) });
    this.clear();
  }

  forget() {
    this.image = null;
    this.clear();
  }

  clear() {
    this.drawn.getContext("2d").clearRect(0, 0, this.drawn.width, this.drawn.height);
    this.show();
  }

  fill(x, y, width, height) {
    const context = this.drawn.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(x * this.drawn.width, y * this.drawn.height, width * this.drawn.width, height * this.drawn.height);
    this.show();
  }

  stroke(event) {
    const box = this.canvas.getBoundingClientRect();
    const at = [((event.clientX - box.left) / box.width) * this.drawn.width, ((event.clientY - box.top) / box.height) * this.drawn.height];
    const context = this.drawn.getContext("2d");
    Object.assign(context, { strokeStyle: "white", lineWidth: this.brush.valueAsNumber, lineCap: "round" });
    context.beginPath();
    context.moveTo(...(this.last ?? at));
    context.lineTo(...at);
    context.stroke();
    this.last = at;
    this.show();
  }

  show() {
    const context = this.canvas.getContext("2d"), { width, height } = this.canvas;
    context.clearRect(0, 0, width, height);
    if (!this.image) return;
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, 0, 0, width, height);
    const tinted = Object.assign(document.createElement("canvas"), { width, height }), over = tinted.getContext("2d");
    over.drawImage(this.drawn, 0, 0);
    over.globalCompositeOperation = "source-in";
    over.fillStyle = TINT;
    over.fillRect(0, 0, width, height);
    context.drawImage(tinted, 0, 0);
  }

  // PNG in base64, at the picture's size
  mask() {
    const canvas = Object.assign(document.createElement("canvas"), { height: this.size[0], width: this.size[1] });
    const context = canvas.getContext("2d");
    context.fillStyle = "black";
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.drawn, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/png").split(",")[1];
  }
}
