"use strict";
// Playback of the denoising steps. Without this script the page shows the last frame and the change map.
for (const player of document.querySelectorAll(".player")) {
  const data = JSON.parse(player.querySelector("script").textContent);
  const part = (name) => player.querySelector(`[data-${name}]`);
  const canvas = part("canvas"), slider = part("slider"), play = part("play"), status = part("status");
  const rows = [...player.querySelectorAll(".change-map .settled")];
  const last = data.frames.length - 1;
  let timer = null;

  const show = (index) => {
    const changed = new Set(data.changed[index]);
    canvas.replaceChildren(...data.frames[index].map((piece, position) => {
      const [text, kind] = data.pieces[piece];
      const token = document.createElement("span");
      token.className = `tok ${kind}${changed.has(position) ? " chg" : ""}`;
      token.textContent = text;
      return token;
    }));
    slider.value = index;
    const count = index === 0 && data.labels[0] !== "start" ? "first prediction" : `${changed.size} changed`;
    status.textContent = index === 0 && data.labels[0] === "start" ? "start: random tokens" : `${data.labels[index]} of ${last + (data.labels[0] === "start" ? 0 : 1)} · ${count}`;
    slider.setAttribute("aria-valuetext", status.textContent);
    rows.forEach((row, i) => row.classList.toggle("now", i === index));
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶ Play";
    play.setAttribute("aria-label", "Play");
  };
  const start = () => {
    show(Number(slider.value) === last ? 0 : Number(slider.value));
    play.textContent = "❚❚ Pause";
    play.setAttribute("aria-label", "Pause");
    timer = setInterval(() => {
      if (Number(slider.value) === last) return stop();
      show(Number(slider.value) + 1);
    }, Math.max(150, Math.min(900, 9000 / (last + 1))));
  };

  // Reserve the height of the tallest frame, so that the controls do not move during playback.
  let tallest = 0;
  for (let index = 0; index <= last; index += 1) {
    show(index);
    tallest = Math.max(tallest, canvas.offsetHeight);
  }
  canvas.style.minHeight = `${tallest}px`;
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  play.addEventListener("click", () => (timer === null ? start() : stop()));
  part("controls").hidden = false;
  part("final").hidden = true;
}
