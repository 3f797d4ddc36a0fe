(() => {
  "use strict";
  const list = document.getElementById("sample-list");
  const form = document.getElementById("sample-filter");
  if (!list || !form) return;
  const articles = Array.from(list.children);
  const fields = ["set", "category"].map((name) => [name, form.elements[name]]).filter(([, field]) => field);
  const search = form.elements.search;
  const order = form.elements.order;
  const shown = document.getElementById("sample-count");
  const texts = new Map();
  const text = (article) => {
    if (!texts.has(article)) texts.set(article, article.textContent.toLowerCase());
    return texts.get(article);
  };
  const gain = (article) => {
    const value = Number.parseFloat(article.dataset.gain);
    return Number.isNaN(value) ? null : value;
  };
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const article of articles) {
      const fits =
        fields.every(([name, field]) => field.value === "" || article.dataset[name] === field.value) &&
        words.every((word) => text(article).includes(word));
      article.hidden = !fits;
      if (fits) count += 1;
    }
    shown.textContent = count + " of " + articles.length + " shown";
  };
  const sort = () => {
    const sign = { rose: -1, fell: 1 }[order.value] || 0;
    const sorted = articles.slice();
    if (sign) {
      sorted.sort((a, b) => {
        const [x, y] = [gain(a), gain(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (x - y);
      });
    }
    list.append(...sorted);
  };
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  if (order) order.addEventListener("change", sort);
  filter();
})();
