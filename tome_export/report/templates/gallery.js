"use strict";
// Leads the pictures of merged tokens through the layers; draws what visualize.draw draws.
(() => {
  const holder = document.getElementById("gallery-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const gallery = document.getElementById("gallery");
  const slider = document.getElementById("layer");
  const state = document.getElementById("state");
  const play = document.getElementById("play");
  const figures = [...gallery.querySelectorAll("figure")];
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  // Two bytes per patch, the low one first whatever the machine: its group, 0 for none.
  const groupsOf = (text) => {
    const raw = bytes(text);
    return Array.from({ length: raw.length / 2 }, (_, i) => raw[2 * i] | (raw[2 * i + 1] << 8));
  };

  const draw = (index, layer) => {
    const image = data.images[index];
    const figure = figures[index];
    const canvas = figure.querySelector("canvas");
    const photo = figure.querySelector("img");
    const { rows, cols, scale, stroke, hatch } = image;
    const [droppedGroup, dark, line] = data.dropped;
    const width = image.width * scale;
    const height = image.height * scale;
    canvas.width = photo.naturalWidth * scale;
    canvas.height = photo.naturalHeight * scale;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(photo, 0, 0, canvas.width, canvas.height);
    const note = figure.querySelector(".size");
    if (layer < 0) {
      note.textContent = "every patch a token";
      canvas.setAttribute("aria-label", "The image, every patch a token");
      return;
    }
    const [groupText, colourText, largest, dropped] = image.layers[layer];
    const groups = groupsOf(groupText);
    const colours = bytes(colourText);
    const at = (row, col) =>
      row < 0 || col < 0 || row >= rows || col >= cols ? -1 : groups[row * cols + col];
    groups.forEach((group, patch) => {
      if (group === 0) return;
      const row = Math.floor(patch / cols);
      const col = patch % cols;
      const x = col * width;
      const y = row * height;
      if (group === droppedGroup) {
        context.fillStyle = dark;
        context.fillRect(x, y, width, height);
        context.fillStyle = line;
        // Lines run on from patch to patch: where the sum of both coordinates is a multiple of step.
        const [step, thick] = hatch;
        for (let down = 0; down < height; down++) {
          const phase = (x + y + down) % step;
          for (let right = -phase; right < width; right += step) {
            const from = Math.max(right, 0);
            const to = Math.min(right + thick, width);
            if (to > from) context.fillRect(x + from, y + down, to - from, 1);
          }
        }
        return;
      }
      const [red, green, blue, outline] = colours.subarray(4 * (group - 1), 4 * group);
      context.fillStyle = `rgb(${red}, ${green}, ${blue})`;
      context.fillRect(x, y, width, height);
      context.fillStyle = data.palette[outline];
      for (const down of [-1, 0, 1]) {
        for (const right of [-1, 0, 1]) {
          if (at(row + down, col + right) === group) continue;
          context.fillRect(
            right > 0 ? x + width - stroke : x,
            down > 0 ? y + height - stroke : y,
            right === 0 ? width : stroke,
            down === 0 ? height : stroke,
          );
        }
      }
    });
    const single = dropped ? "every token one patch" : "every patch a token";
    const said =
      (largest > 1 ? `largest token: ${largest} patches` : single) +
      (dropped ? `, ${dropped} dropped` : "");
    note.textContent = said;
    canvas.setAttribute("aria-label", `The image after layer ${layer}, ${said}`);
  };

  const show = () => {
    const step = Number(slider.value);
    const where = step === 0 ? "before layer 0" : `after layer ${step - 1}`;
    const text = `${where}: ${data.tokens[step]} token${data.tokens[step] === 1 ? "" : "s"}`;
    state.textContent = text;
    slider.setAttribute("aria-valuetext", text);
    figures.forEach((_, index) => draw(index, step - 1));
  };

  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (slider.value === slider.max) slider.value = 0;
    else slider.value = Number(slider.value) + 1;
    show();
    play.textContent = "Stop";
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stop();
    }, 700);
  });
  slider.addEventListener("input", () => {
    stop();
    show();
  });

  Promise.all(figures.map((figure) => figure.querySelector("img").decode())).then(() => {
    gallery.classList.add("drawn");
    gallery.querySelector(".controls").hidden = false;
    figures.forEach((figure) => (figure.querySelector("canvas").hidden = false));
    show();
  });
})();
