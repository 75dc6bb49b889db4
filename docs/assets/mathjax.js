// Formulas are where Markdown found them. The menu and what it offers would be loaded from files that are not carried along.
window.MathJax = {
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex", enableMenu: false },
};
