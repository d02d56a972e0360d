"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Theme: the system's, then the other one, remembered where the browser allows it.
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const store = {
    get() { try { return localStorage.getItem("fedkl-theme"); } catch { return null; } },
    set(value) { try { localStorage.setItem("fedkl-theme", value); } catch { /* file:// may forbid */ } },
  };
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const tell = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Use the light theme" : "Use the dark theme");
  };
  if (["light", "dark"].includes(store.get())) root.dataset.theme = store.get();
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    store.set(root.dataset.theme);
    tell();
  });
  system.addEventListener("change", tell);
  tell();

  // On paper everything is unfolded but what would fill pages with small print.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open], [data-heavy])")];
    for (const one of folded) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of folded) one.open = false; });

  const shown = (value) => (typeof value === "number" ? value.toFixed(2).replace("-", "\u2212") : "\u2013");
  const nearest = (list, wanted) => list.reduce(
    (best, x, i) => (Math.abs(x - wanted) < Math.abs(list[best] - wanted) ? i : best), 0);

  const films = [...document.querySelectorAll("[data-film]")];
  const stops = films.map((film) => {
    const steps = JSON.parse(film.dataset.steps);
    const slider = film.querySelector("input[type=range]");
    const output = film.querySelector("output");
    const play = film.querySelector("[data-play]");
    const tracks = [...film.querySelectorAll("[data-track]")].map((figure) => ({
      ...JSON.parse(figure.dataset.track),
      view: figure.querySelector("svg.pic"),
      ssim: figure.querySelector("[data-ssim]"),
    }));
    const markers = [...film.querySelectorAll("[data-now]")];
    const show = () => {
      const step = steps[Number(slider.value)];
      const words = [];
      for (const track of tracks) {
        const frame = nearest(track.iterations, step);
        track.view.setAttribute("viewBox", `${frame * track.width} 0 ${track.width} ${track.height}`);
        track.ssim.textContent = shown(track.ssims[frame]);
        words.push(shown(track.ssims[frame]));
      }
      for (const line of markers) {
        const { left, right, high } = line.dataset;
        const x = Number(left) + Math.min(step / Number(high), 1) * (right - left);
        line.setAttribute("x1", x);
        line.setAttribute("x2", x);
      }
      output.textContent = `iteration ${Math.round(step)}`;
      slider.setAttribute("aria-valuetext", `iteration ${Math.round(step)}, SSIM ${words.join(", ")}`);
    };
    let timer = 0;
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      play.textContent = "Play";
    };
    slider.addEventListener("input", () => { stop(); show(); });
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (Number(slider.value) === steps.length - 1) slider.value = 0;
      show();
      play.textContent = "Pause";
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        show();
        if (Number(slider.value) >= steps.length - 1) stop();
      }, 220);
    });
    film.querySelector(".controls").hidden = false;
    show();
    return stop;
  });

  const choice = document.getElementById("film-choice");
  if (choice) {
    const pick = () => films.forEach((film, i) => {
      film.hidden = i !== Number(choice.value);
      if (film.hidden) stops[i]();
    });
    choice.closest(".choose").hidden = films.length < 2;
    choice.addEventListener("change", pick);
    pick();
  }
})();
