"""What tests of the page do in a tab, as a person does: read, click, type; by labels, as screen readers say them."""

import json

from tests.browser.chromium import Page


def has(selector: str, text: str) -> str:
    """An expression: whether an element shows a text."""
    return f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})"


def button(label: str) -> str:
    """An expression: a button by what a screen reader says of it."""
    wanted = json.dumps(label)
    return (
        "[...document.querySelectorAll('button')]"
        f".find(it => it.checkVisibility() && (it.getAttribute('aria-label') ?? it.innerText) === {wanted})"
    )


def field(label: str) -> str:
    """An expression: a field by its label."""
    wanted = json.dumps(label)
    name = "(it.getAttribute('aria-label') ?? it.labels?.[0]?.firstChild?.textContent ?? '').trim()"
    return f"[...document.querySelectorAll('input, textarea, select')].find(it => {name} === {wanted})"


async def click(page: Page, label: str) -> None:
    """Click a button, once it is there and acts."""
    acts = f"{button(label)} && !{button(label)}.disabled && !{button(label)}.hasAttribute('aria-disabled')"
    await page.until(acts)
    await page.evaluate(f"{button(label)}.click()")


async def fill(page: Page, label: str, text: str) -> None:
    """Have a text in a field, as if somebody had typed it there."""
    await page.until(field(label))
    await page.evaluate(
        f"(it => {{ it.focus(); it.value = {json.dumps(text)}; it.dispatchEvent(new Event('input', {{bubbles: true}}));"
        f" it.dispatchEvent(new Event('change', {{bubbles: true}})) }})({field(label)})"
    )


async def value(page: Page, label: str) -> str:
    """What a field holds."""
    return str(await page.evaluate(f"{field(label)}.value"))


async def goes(page: Page, screen: str) -> None:
    """Another screen."""
    await page.evaluate(f"location.hash = {json.dumps('#/' + screen)}")
    await page.until(f"document.querySelector('main').className === {json.dumps(screen.partition('/')[0])}")
    await page.until("document.querySelector('main h1')")


async def sends(page: Page, more: dict[str, object]) -> None:
    """What the page sends to engines from now on has more keys in it."""
    await page.evaluate(
        "((real) => { window.fetch = (url, options) => real(url, options?.body && String(url).includes('/v1/') ?"
        f" {{...options, body: JSON.stringify({{...JSON.parse(options.body), ...{json.dumps(more)}}})}} : options)"
        " })(window.fetch)"
    )


async def fits(page: Page) -> bool:
    """Whether nothing is wider than the page."""
    return bool(await page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


async def violations(page: Page, axe: str) -> list[str]:
    """What axe finds wrong with what a page shows, each with an element."""
    if not await page.evaluate("typeof axe === 'object'"):
        await page.evaluate(f"{axe}; undefined")
    found = await page.evaluate(
        "axe.run().then(found => found.violations.map(it => "
        "`${it.id}: ${it.nodes.map(node => node.target + ' ' + (node.any[0]?.message ?? '')).join(' | ')}`))"
    )
    return [str(one) for one in found]
