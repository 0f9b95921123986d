// What needs no server: copy texts, and show the image that the slider chooses.
const adagn = {
  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // without TLS, browsers allow this on the loopback address only
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    return [];
  },
  copyLink(tab, names, values) {
    const query = new URLSearchParams({tab});
    names.forEach((name, i) => {
      const value = values[i];
      if (value !== null && value !== undefined && String(value) !== "") query.set(name, String(value));
    });
    adagn.copy(`${location.origin}${location.pathname}?${query}`);
    return [];
  },
  show(id, share) {
    const figures = document.querySelectorAll(`#${id} .adagn-strip figure`);
    const large = document.querySelector(`#${id} .adagn-large`);
    if (figures.length) large.replaceChildren(figures[Math.round(share * (figures.length - 1))].cloneNode(true));
    return [];
  },
};
