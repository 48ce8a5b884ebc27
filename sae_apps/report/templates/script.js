"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Charts: one Tab stop each, arrow keys walk along the marks; the page's own label replaces the
  // browser's slow tooltip.
  for (const chart of all("svg.chart")) {
    const marks = all(".mark", chart);
    marks.forEach((mark, i) => {
      const title = mark.querySelector("title");
      mark.setAttribute("aria-label", title.textContent);
      title.remove();
      mark.setAttribute("tabindex", i ? "-1" : "0");
    });
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -1e9, End: 1e9 }[event.key];
      const here = marks.indexOf(document.activeElement);
      if (!step || here < 0) return;
      event.preventDefault();
      const there = Math.min(marks.length - 1, Math.max(0, here + step));
      marks[here].setAttribute("tabindex", "-1");
      marks[there].setAttribute("tabindex", "0");
      marks[there].focus();
    });
  }

  // Navigation: mark the section in view.
  const links = new Map(all("#sections a").map((a) => [a.hash.slice(1), a]));
  if (window.IntersectionObserver) {
    const seen = new Set();
    const observer = new IntersectionObserver((entries) => {
      for (const e of entries) e.isIntersecting ? seen.add(e.target.id) : seen.delete(e.target.id);
      const current = [...links.keys()].find((id) => seen.has(id));
      for (const [id, a] of links) {
        if (id === current) a.setAttribute("aria-current", "true");
        else if (current) a.removeAttribute("aria-current");
      }
    }, { rootMargin: "-20% 0px -60% 0px" });
    for (const section of all("main > section")) observer.observe(section);
  }

  // Latents: filter and order. A link may carry both: report.html#q=python&order=rare
  const form = document.getElementById("latents-controls");
  if (form) {
    const query = document.getElementById("latents-query");
    const order = document.getElementById("latents-order");
    const list = document.getElementById("latents-cards");
    const given = all(".card", list);
    const words = new Map(given.map((card) => [card, card.textContent.toLowerCase()]));
    const keys = {
      given: (card) => given.indexOf(card),
      number: (card) => Number(card.dataset.latent),
      frequent: (card) => -Number(card.dataset.freq),
      rare: (card) => (card.dataset.freq < 0 ? Infinity : Number(card.dataset.freq)),
    };
    const apply = () => {
      const wanted = query.value.trim().toLowerCase();
      const key = keys[order.value] || keys.given;
      let shown = 0;
      for (const card of [...given].sort((a, b) => key(a) - key(b) || keys.given(a) - keys.given(b))) {
        card.hidden = !words.get(card).includes(wanted);
        shown += card.hidden ? 0 : 1;
        for (const more of all("details", card)) {
          more.open = wanted !== "" && more.textContent.toLowerCase().includes(wanted);
        }
        list.append(card);
      }
      document.getElementById("latents-count").textContent = `${shown} of ${given.length} shown`;
      document.getElementById("latents-nothing").hidden = shown > 0;
    };
    const fromHash = () => {
      const wanted = new URLSearchParams(location.hash.slice(1));
      if (!wanted.has("q") && !wanted.has("order")) return;
      query.value = wanted.get("q") || "";
      order.value = wanted.get("order") in keys ? wanted.get("order") : "given";
      apply();
      document.getElementById("latents").scrollIntoView();
    };
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    query.addEventListener("input", apply);
    order.addEventListener("change", apply);
    window.addEventListener("hashchange", fromHash);
    apply();
    fromHash();
  }
})();
