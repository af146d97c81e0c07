"use strict";
(() => {
  // The moment that the slider shows: a line through all figures over time, and what was known then.
  function wire() {
    const bar = document.querySelector(".cursor-bar");
    if (!bar) return;
    const { heads, rows } = JSON.parse(document.getElementById("moments").textContent);
    const slider = bar.querySelector("input"), output = bar.querySelector("output");
    if (!rows.length) return;
    bar.hidden = false;
    const show = () => {
      const [part, end, values] = rows[slider.value];
      for (const line of document.querySelectorAll(".timed .cursor")) {
        const place = line.closest(".close") ? end : part;
        line.setAttribute("x1", `${place * 100}%`);
        line.setAttribute("x2", `${place * 100}%`);
      }
      document.body.classList.add("pointed");
      output.replaceChildren(...heads.map((head, at) => {
        const item = document.createElement("span");
        item.append(Object.assign(document.createElement("small"), { textContent: head }), values[at]);
        return item;
      }));
      slider.setAttribute("aria-valuetext", heads.map((head, at) => `${head}: ${values[at]}`).join(", "));
    };
    slider.addEventListener("input", show);
    for (const figure of document.querySelectorAll("svg.timed")) {
      figure.addEventListener("pointermove", (event) => {
        const box = figure.getBoundingClientRect();
        const part = (event.clientX - box.left) / box.width;
        if (part < 0 || part > 1) return;
        const axis = figure.matches(".close") ? 1 : 0;
        let nearest = 0;
        rows.forEach((row, at) => {
          if (Math.abs(row[axis] - part) < Math.abs(rows[nearest][axis] - part)) nearest = at;
        });
        slider.value = nearest;
        show();
      });
    }
    return show;
  }

  // A live page asks for itself anew, and puts into place what is another than before.
  async function renew() {
    let next;
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      next = new DOMParser().parseFromString(await answer.text(), "text/html");
    } catch {
      document.documentElement.removeAttribute("data-live");
      return;
    }
    const slider = document.getElementById("moment");
    const held = slider && slider.value !== slider.max ? slider.value : null;
    const focused = document.activeElement && document.activeElement.id;
    const open = new Set([...document.querySelectorAll("details[open]")].map((each) => each.id));
    document.title = next.title;
    const parts = [...next.querySelectorAll("[data-part]")].map((each) => each.dataset.part);
    const known = [...document.querySelectorAll("[data-part]")].map((each) => each.dataset.part);
    if (parts.join() !== known.join()) {
      document.querySelector("main").replaceWith(next.querySelector("main"));
    }
    for (const part of next.querySelectorAll("[data-part]")) {
      const old = document.querySelector(`[data-part="${part.dataset.part}"]`);
      if (old && old.outerHTML !== part.outerHTML) old.replaceWith(part);
    }
    for (const each of document.querySelectorAll("details")) each.open = open.has(each.id);
    if (!next.documentElement.hasAttribute("data-live")) document.documentElement.removeAttribute("data-live");
    const show = wire();
    if (held !== null && show) {
      document.getElementById("moment").value = held;
      show();
    }
    if (focused && document.getElementById(focused)) document.getElementById(focused).focus();
    again();
  }

  function again() {
    if (document.documentElement.hasAttribute("data-live")) setTimeout(renew, 1000);
  }

  wire();
  again();
})();
