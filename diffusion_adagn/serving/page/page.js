// What needs no server: copy texts, and show the image that the slider chooses.
const adagn = {
  address: location.href,  // until its settings are in the page
  opened() {
    adagn.address = null;
    return [];
  },
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
    if (adagn.address) {
      adagn.copy(adagn.address);
      return [];
    }
    const query = new URLSearchParams({tab});
    names.forEach((name, i) => {
      const value = values[i];
      if (value !== null && value !== undefined && String(value) !== "") query.set(name, String(value));
    });
    adagn.copy(`${location.origin}${location.pathname}?${query}`);
    return [];
  },
  show(id, share) {
    setTimeout(() => {  // after the result is in the page
      const figures = document.querySelectorAll(`#${id} .adagn-strip figure`);
      const large = document.querySelector(`#${id} .adagn-large`);
      if (figures.length) large.replaceChildren(figures[Math.round(share * (figures.length - 1))].cloneNode(true));
    });
    return [];
  },
};
