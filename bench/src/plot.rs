//! Reports as pictures.

use anyhow::{Result, anyhow};
use plotters::backend::SVGBackend;
use plotters::chart::{ChartBuilder, ChartContext, LabelAreaPosition};
use plotters::coord::Shift;
use plotters::coord::cartesian::Cartesian2d;
use plotters::coord::types::RangedCoordf64;
use plotters::drawing::{DrawingArea, IntoDrawingArea as _};
use plotters::element::{Circle, PathElement, Rectangle, Text};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color as _, IntoFont as _, RGBColor, ShapeStyle, TextStyle, WHITE};

use crate::report::{Of, Panel, Report, Series, number};
use crate::table::reach_cell;

const WIDTH: u32 = 960;
const HEADER: u32 = 66;
const LINES_HEIGHT: u32 = 320;
/// Above the axes of a panel: its title, and its legend.
const TITLE: u32 = 30;
const LEGEND: u32 = 20;
/// Below them.
const AXIS: u32 = 46;
const BAR: u32 = 20;
const GAP: u32 = 8;
/// What a letter takes at most, of the size that labels have.
const LETTER: u32 = 7;

const TEXT: RGBColor = RGBColor(0x24, 0x29, 0x2f);
const FAINT: RGBColor = RGBColor(0x6e, 0x77, 0x81);
const MESH: RGBColor = RGBColor(0xe4, 0xe7, 0xeb);
const MISSED: RGBColor = RGBColor(0xcf, 0x22, 0x2e);
/// Okabe and Ito's colours, which people who do not see all colours tell apart as well.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0xd5, 0x5e, 0x00),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// The picture of a report, as SVG.
pub(crate) fn svg(report: &Report) -> Result<String> {
    let heights: Vec<_> = report.panels.iter().map(height).collect();
    let mut svg = String::new();
    {
        let size = (WIDTH, HEADER + heights.iter().sum::<u32>());
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE).map_err(error)?;
        let (header, mut rest) = root.split_vertically(HEADER);
        write(&header, &report.title, (16, 12), &style(20.0, TEXT))?;
        let quick = if report.quick { " (a quick look only)" } else { "" };
        let Report { machine, repetitions, .. } = report;
        let line = format!(
            "{}, {} cores, Linux {}; {} ({}); medians of {repetitions} repetitions{quick}",
            machine.cpu, machine.cores, machine.kernel, machine.vxcsum, machine.commit
        );
        write(&header, &line, (16, 40), &style(12.0, FAINT))?;
        for (panel, height) in report.panels.iter().zip(heights) {
            let (area, below) = rest.split_vertically(height);
            if panel.axis.is_some() {
                lines(&area, panel)?
            } else {
                bars(&area, panel)?
            }
            rest = below;
        }
        root.present().map_err(error)?;
    }
    Ok(svg)
}

fn height(panel: &Panel) -> u32 {
    if panel.axis.is_some() {
        return LINES_HEIGHT;
    }
    let legend = if variants(panel).is_empty() { 0 } else { LEGEND };
    let (bars, groups) = (panel.series.len() as u32, names(panel).len() as u32);
    TITLE + legend + bars * BAR + groups * GAP + AXIS
}

fn bars(area: &Area<'_>, panel: &Panel) -> Result<()> {
    let (variants, names) = (variants(panel), names(panel));
    let legend = if variants.is_empty() { 0 } else { LEGEND };
    let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or_default();
    let left = (longest as u32 * LETTER + 24).clamp(120, 420);
    let height = panel.series.len() as u32 * BAR + names.len() as u32 * GAP;
    write(area, &title(panel), (16, 4), &style(15.0, TEXT))?;
    draw_legend(area, &variants)?;
    // Room for what stands behind the longest bar.
    let most = panel.series.iter().map(|series| series.max).fold(0.0, f64::max);
    let most = if most > 0.0 { most * 1.45 } else { 1.0 };
    let mut chart = ChartBuilder::on(area)
        .margin_top(TITLE + legend)
        .margin_right(16)
        .set_label_area_size(LabelAreaPosition::Left, left)
        .set_label_area_size(LabelAreaPosition::Bottom, AXIS)
        .build_cartesian_2d(0.0..most, f64::from(height)..0.0)
        .map_err(error)?;
    mesh(&mut chart, &panel.unit, None, |_| String::new())?;

    let label = style(13.0, TEXT).pos(Pos::new(HPos::Right, VPos::Center));
    let mut y = f64::from(GAP) / 2.0;
    for name in names {
        let group: Vec<_> = panel.series.iter().filter(|series| series.name == name).collect();
        let tall = f64::from(BAR) * group.len() as f64;
        let middle = TITLE + legend + (y + tall / 2.0) as u32;
        write(area, name, (left.cast_signed() - 8, middle.cast_signed()), &label)?;
        for series in group {
            let colour = colour(&variants, series);
            draw_bar(&mut chart, series, y, colour)?;
            y += f64::from(BAR);
        }
        y += f64::from(GAP);
    }
    Ok(())
}

fn draw_bar(chart: &mut Chart<'_, '_>, series: &Series, y: f64, colour: RGBColor) -> Result<()> {
    let (top, bottom, middle) = (y + 3.0, y + 17.0, y + 10.0);
    let bar = Rectangle::new([(0.0, top), (series.median, bottom)], colour.filled());
    chart.draw_series([bar]).map_err(error)?;
    let thin = ShapeStyle::from(&TEXT).stroke_width(1);
    let whisker = [(series.min, middle), (series.max, middle)];
    chart.draw_series([PathElement::new(whisker, thin)]).map_err(error)?;
    let mut text = number(series.median);
    if let Some(ratio) = &series.ratio {
        text += &format!("  ({:.3})", ratio.median);
    }
    let mut text_colour = TEXT;
    if let Some(reach) = series.reach {
        text += &format!("  to reach {}", reach_cell(reach));
        if !reach.met {
            text_colour = MISSED;
        }
        if reach.of == Of::Median && reach.limit <= chart.x_range().end {
            let mark = [(reach.limit, y), (reach.limit, y + f64::from(BAR))];
            let thick = ShapeStyle::from(&MISSED).stroke_width(2);
            chart.draw_series([PathElement::new(mark, thick)]).map_err(error)?;
        }
    }
    let behind = match series.reach {
        // Not on the mark.
        Some(reach) if reach.of == Of::Median && reach.limit < chart.x_range().end * 0.6 => {
            series.max.max(reach.limit)
        }
        _ => series.max,
    };
    let place = style(12.0, text_colour).pos(Pos::new(HPos::Left, VPos::Center));
    let text = Text::new(format!(" {text}"), (behind, middle), place);
    chart.draw_series([text]).map_err(error)?;
    Ok(())
}

fn lines(area: &Area<'_>, panel: &Panel) -> Result<()> {
    let variants = variants(panel);
    let legend = if variants.is_empty() { 0 } else { LEGEND };
    write(area, &title(panel), (16, 4), &style(15.0, TEXT))?;
    draw_legend(area, &variants)?;
    // Evenly spaced: each is a multiple of the one before.
    let mut places: Vec<_> = panel.series.iter().filter_map(|series| series.at).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    let last = places.len().saturating_sub(1) as f64;
    let most = panel.series.iter().map(|series| series.max).fold(0.0, f64::max);
    let most = if most > 0.0 { most * 1.1 } else { 1.0 };
    let mut chart = ChartBuilder::on(area)
        .margin_top(TITLE + legend)
        .margin_right(24)
        .set_label_area_size(LabelAreaPosition::Left, 80)
        .set_label_area_size(LabelAreaPosition::Bottom, AXIS)
        .build_cartesian_2d(-0.2..last + 0.2, 0.0..most)
        .map_err(error)?;
    let names: Vec<_> = places.iter().copied().map(number).collect();
    mesh(&mut chart, panel.axis.as_deref().unwrap_or_default(), Some(&panel.unit), |at| {
        // Ticks between places have no name.
        let index = at.round();
        let name = names.get(index.max(0.0) as usize);
        name.filter(|_| (at - index).abs() < 1e-6).cloned().unwrap_or_default()
    })?;

    let all = if variants.is_empty() { vec![None] } else { variants.iter().map(Some).collect() };
    for variant in all {
        let on_it = panel.series.iter().filter(|series| series.variant.as_ref() == variant);
        let points: Vec<_> = on_it
            .filter_map(|series| {
                let at = series.at?;
                let index = places.iter().position(|place| place.total_cmp(&at).is_eq())?;
                Some((index as f64, series))
            })
            .collect();
        let Some((_, first)) = points.first() else { continue };
        let colour = colour(&variants, first);
        let line: Vec<_> = points.iter().map(|(x, series)| (*x, series.median)).collect();
        let thick = ShapeStyle::from(&colour).stroke_width(2);
        chart.draw_series([PathElement::new(line, thick)]).map_err(error)?;
        for (x, series) in points {
            let thin = ShapeStyle::from(&colour).stroke_width(1);
            let whisker = [(x, series.min), (x, series.max)];
            chart.draw_series([PathElement::new(whisker, thin)]).map_err(error)?;
            let dot = Circle::new((x, series.median), 3, colour.filled());
            chart.draw_series([dot]).map_err(error)?;
        }
    }
    Ok(())
}

/// Axes: of bars only the one below, else both.
fn mesh(
    chart: &mut Chart<'_, '_>,
    x: &str,
    y: Option<&str>,
    name: impl Fn(f64) -> String,
) -> Result<()> {
    let is_lines = y.is_some();
    let x_name = |at: &f64| if is_lines { name(*at) } else { number(*at) };
    let y_name = |at: &f64| if is_lines { number(*at) } else { String::new() };
    let mut mesh = chart.configure_mesh();
    mesh.x_label_formatter(&x_name)
        .y_label_formatter(&y_name)
        .x_desc(x)
        .label_style(style(12.0, FAINT))
        .axis_desc_style(style(12.0, FAINT))
        .axis_style(MESH)
        .bold_line_style(MESH)
        .light_line_style(WHITE);
    match y {
        Some(unit) => {
            mesh.y_desc(unit);
        }
        None => {
            mesh.disable_y_mesh().disable_y_axis();
        }
    }
    mesh.draw().map_err(error)
}

fn draw_legend(area: &Area<'_>, variants: &[String]) -> Result<()> {
    let mut x = 16;
    for (variant, colour) in variants.iter().zip(COLOURS.iter().cycle()) {
        let y = TITLE.cast_signed() - 2;
        area.draw(&Rectangle::new([(x, y), (x + 12, y + 12)], colour.filled())).map_err(error)?;
        write(area, variant, (x + 18, y - 1), &style(12.0, TEXT))?;
        x += 36 + (variant.chars().count() as u32 * LETTER).cast_signed();
    }
    Ok(())
}

fn title(panel: &Panel) -> String {
    format!("{}, {}", panel.title, panel.unit)
}

/// Names in order, each once.
fn names(panel: &Panel) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for series in &panel.series {
        if !names.contains(&series.name.as_str()) {
            names.push(&series.name);
        }
    }
    names
}

/// Variants in order, each once.
fn variants(panel: &Panel) -> Vec<String> {
    let mut variants: Vec<String> = Vec::new();
    for variant in panel.series.iter().filter_map(|series| series.variant.as_ref()) {
        if !variants.contains(variant) {
            variants.push(variant.clone());
        }
    }
    variants
}

fn colour(variants: &[String], series: &Series) -> RGBColor {
    let index = variants.iter().position(|variant| Some(variant) == series.variant.as_ref());
    COLOURS[index.unwrap_or_default() % COLOURS.len()]
}

fn style(size: f64, colour: RGBColor) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&colour)
}

fn write(area: &Area<'_>, text: &str, at: (i32, i32), style: &TextStyle<'_>) -> Result<()> {
    area.draw_text(text, style, at).map_err(error)
}

/// Its error type names the backend and borrows.
fn error(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}
